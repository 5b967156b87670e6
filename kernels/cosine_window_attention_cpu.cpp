// Cosine window attention on CPU, forward and backward. Compiled once per instruction set, as vectors.h explains.
//
// Words. Matrix products run on words of 32 bits: one float32, or two bfloat16 that lie next to each other along the
// contracted dimension, where the processor has their dot product (PAIR). A product reads
//     a  (rows, contraction words)
//     b  (contraction words, columns)
// which is what vector instructions want (a word of a times a vector of b) and what AMX tiles are made of. So a matrix
// x (tokens, D) is kept in up to four forms:
//     rows        (token, word of D)          a, contracted over D
//     transposed  (word of D, token)          b, contracted over D
//     columns     (word of tokens, D)         b, contracted over tokens; the same as rows unless words are pairs
//     across      (D, word of tokens)         a, contracted over tokens; the same as transposed unless words are pairs
//
// A task is one head of a chunk of windows. It takes a few windows at a time, for each pair of a query tile and a key
// tile, so that the tile's bias is laid out once for all of them. Logits are in units of log 2. Where products are by
// vectors, those of queries and keys, and of gradients and values, stay in registers until they are probabilities.

#include "cosine_window_attention_cpu.h"
#include "cosine_window_attention_products.h"

namespace cosine_window_attention {
namespace {

using namespace vectors;

// -- one task --------------------------------------------------------------------------------------------------------------

constexpr int QUERY_TILE = 64;                      // tokens, at most
constexpr int STRIP = 4, TWO = 2;                   // queries whose products stay in registers, forward and backward
constexpr int GROUP = 16, GROUP_BYTES = 512 << 10;  // windows that share a tile's bias, as many as stay in the cache

struct Run {  // keys of a tile that lie in one row of the window: their biases are contiguous
  int key, length, offset;
};

template <class Element, class T, bool PAIR>
struct Task {
  using W = Words<T, PAIR>;
  static constexpr int LANE = LANES<T>;
#if defined(__AMX_BF16__)
  static constexpr bool TILES = PAIR;
#else
  static constexpr bool TILES = false;
#endif
  static constexpr int GRAIN = TILES ? 32 : LANE;       // of tokens in products
  static constexpr int KEY_TILE = TILES ? 128 : 144;    // tokens, a multiple of GRAIN
  static constexpr int WORD_TILE = KEY_TILE / W::SIZE;  // words of keys in a row of `left`

  struct Window {  // one head of one window
    T *q_rows, *q_columns, *q_across, *k_rows, *k_columns, *k_transposed, *v_columns, *v_transposed;
    T *g_rows, *g_columns, *g_across;  // of grad_out
    T *grad_q, *grad_k, *grad_v;       // with respect to unit q and k; (token, D), (D, token), (D, token)
    T *q_inverse, *k_inverse;       // 1 / length
    T *origin, *total, *out;        // forward: of the query tile, what logits are relative to, sums (by lane), rows of out
    T *lse, *delta;                 // backward: log-sum-exp in units of log 2, and Σ grad_out · out
    T *grad_sum, *mean;             // of each query, over keys: Σ gradient of logits, Σ probability · cosine
    T *region, *hidden;             // of each key: its region, and -inf if it is absent
    int64_t *token, *coming;        // index on the map, or -1; of the window that is next in this place
    bool masked;
  };

  const Call& call;
  const Problem& p;
  const bool backward;
  const int tokens, padded;         // tokens of a window; the same rounded up for products
  const int token_words;            // words of tokens, in whole vectors
  const int width, words;           // D in whole vectors; words of a row, in whole vectors
  const int query_tile, key_tile;
  const int group;
  char* next;                       // of the scratch memory
  T *table, *table_grad;            // of one head, reversed along every axis, in units of log 2
  T *bias, *bias_grad;              // (query tile, key tile)
  T *logits, *grads;                // (query tile, key tile)
  T *grad_k_rows, *grad_v_rows;     // of a window that is done, (token, D)
  T *left, *pairs, *grad_pairs;     // probabilities and gradients of logits as words
  Run* runs;
  int run_count, tile_query, tile_key, tile_rows, tile_keys;
  int head;
  int coming_head;                  // of the windows that are next
  T scale;
  bool bounded;                     // logits lie so close together that all can be relative to their bound
  T bound;                          // 0 if not bounded; is subtracted from the table
  double scale_grad;
  Window windows[GROUP];

  INLINE int pick_group() const {
    const int forms = backward ? 9 : 3;  // in words; beside those in T
    const int64_t bytes = int64_t(padded) * (forms * words + (backward ? 5 : 1) * width) * int64_t(sizeof(T));
    return most(1, least(GROUP, int(GROUP_BYTES / (bytes > GROUP_BYTES ? GROUP_BYTES : bytes))));
  }

  template <class X>
  X* take(int64_t count) {
    char* start = next;
    next += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
    return reinterpret_cast<X*>(start);
  }

  Task(const Call& call, bool backward, void* scratch)
      : call(call), p(call.problem), backward(backward), tokens(p.tokens()), padded(up_to(tokens, GRAIN)),
        token_words(up_to(padded / W::SIZE, LANE)), width(up_to(p.width, LANE)), words(up_to(p.width / W::SIZE, LANE)),
        query_tile(TILES ? least(padded, QUERY_TILE) : up_to(over(padded, over(padded, QUERY_TILE)), LANE)),
        key_tile(least(padded, KEY_TILE)), group(pick_group()), next(static_cast<char*>(scratch)) {
    const int64_t tile = int64_t(query_tile) * KEY_TILE, rows = padded, columns = int64_t(token_words) * width;
    table = take<T>(p.offsets() + 2 * LANE);
    table_grad = take<T>(backward ? p.offsets() : 0);
    bias = take<T>(tile + LANE);
    bias_grad = take<T>(backward ? tile : 0);
    logits = take<T>(tile);
    grads = take<T>(tile);
    left = take<T>(tile);
    pairs = take<T>(tile);
    grad_pairs = take<T>(tile);
    runs = take<Run>(key_tile + 1);
    grad_k_rows = take<T>(backward ? rows * width : 0);
    grad_v_rows = take<T>(backward ? rows * width : 0);
    for (int i = 0; i < group; ++i) {
      Window& w = windows[i];
      w.token = take<int64_t>(rows);
      w.coming = take<int64_t>(rows);
      w.q_inverse = take<T>(rows);
      w.k_inverse = take<T>(rows);
      w.region = take<T>(rows);
      w.hidden = take<T>(rows);
      w.lse = take<T>(rows);
      w.delta = take<T>(rows);
      w.grad_sum = take<T>(rows);
      w.mean = take<T>(rows);
      w.q_rows = take<T>(rows * words);
      w.k_rows = take<T>(rows * words);
      w.k_transposed = take<T>(rows * words);
      w.v_columns = take<T>(most(rows * width, rows * words));  // holds the rows of v before they are transposed, too
      if (backward) {
        w.v_transposed = take<T>(rows * words);
        w.g_rows = take<T>(rows * words);
        w.q_columns = PAIR ? take<T>(columns) : w.q_rows;
        w.k_columns = PAIR ? take<T>(columns) : w.k_rows;
        w.g_columns = PAIR ? take<T>(columns) : w.g_rows;
        w.q_across = take<T>(columns);
        w.g_across = take<T>(columns);
        w.grad_q = take<T>(rows * width);
        w.grad_k = take<T>(rows * width);
        w.grad_v = take<T>(rows * width);
      } else {
        w.origin = take<T>(query_tile);
        w.total = take<T>(query_tile * LANE);
        w.out = take<T>(int64_t(query_tile) * width);
      }
    }
  }

  // Of either direction: forward keeps less of a window, and so takes more of them at a time.
  static size_t scratch_bytes(const Problem& p) {
    Call call{};
    call.problem = p;
    const auto bytes = [&](bool backward) {
      return size_t(Task(call, backward, nullptr).next - static_cast<char*>(nullptr));
    };
    return bytes(false) > bytes(true) ? bytes(false) : bytes(true);
  }

  // -- the head's table --

  void enter_head(int number) {
    head = number;
    const int64_t offsets = p.offsets();
    const T* from = static_cast<const T*>(call.bias_table) + head * offsets;
    if (backward) memset(table_grad, 0, offsets * sizeof(T));
    const T limit = T(MAX_LOGIT_SCALE), log_scale = static_cast<const T*>(call.logit_scale)[head];
    scale = T(__builtin_exp(double(log_scale > limit ? limit : log_scale)));
    scale_grad = 0;
    T low = from[0], high = from[0];
    for (int64_t i = 0; i < offsets; ++i) low = from[i] < low ? from[i] : low, high = from[i] > high ? from[i] : high;
    const T mask = p.mask_value > 0 ? T(p.mask_value) : T(0);
    // In the smallest windows the true maximum costs little, and keeps a probability of 1 exact.
    bounded = tokens >= 16 && (2 * scale + high - low + mask) * T(LOG2_E) < BOUNDED_RANGE;
    bound = bounded ? (scale + high + mask) * T(LOG2_E) : T(0);
    for (int64_t i = 0; i < offsets; ++i) table[i] = from[offsets - 1 - i] * T(LOG2_E) - bound;
    tile_query = tile_key = -1;
  }

  // Index in the reversed table is a sum of one term of the query and one of the key.
  INLINE int query_offset(int token) const {
    const Place at = p.token_place(token);
    return ((p.window[0] - 1 - at.at[0]) * (2 * p.window[1] - 1) + p.window[1] - 1 - at.at[1]) * (2 * p.window[2] - 1) +
           p.window[2] - 1 - at.at[2];
  }
  INLINE int key_offset(int token) const {
    const Place at = p.token_place(token);
    return (at.at[0] * (2 * p.window[1] - 1) + at.at[1]) * (2 * p.window[2] - 1) + at.at[2];
  }

  // Lay out the bias of a tile, unless it is there. Keys that complete a vector are at -inf.
  void enter_tile(int query, int key, int rows, int keys) {
    if (query == tile_query && key == tile_key) return;
    leave_tile();
    tile_query = query, tile_key = key, tile_rows = rows, tile_keys = keys;
    run_count = 0;
    const int end = least(key + keys, tokens);
    for (int k = key; k < end;) {
      const int length = least(p.window[2] - k % p.window[2], end - k);
      runs[run_count++] = {k - key, length, key_offset(k)};
      k += length;
    }
    for (int q = 0; q < rows; ++q) {
      T* to = bias + int64_t(q) * KEY_TILE;
      const T* from = table + query_offset(query + q);
      for (int r = 0; r < run_count; ++r)  // whole vectors: what is too much is overwritten by the next
        for (int i = 0; i < runs[r].length; i += LANE) store(to + runs[r].key + i, load(from + runs[r].offset + i));
      for (int k = end - key; k < keys; ++k) to[k] = -INF;
    }
    if (backward) memset(bias_grad, 0, sizeof(T) * rows * KEY_TILE);
  }

  // Add the tile's gradient to the table's.
  void leave_tile() {
    if (!backward || tile_query < 0) return;
    for (int q = 0; q < tile_rows; ++q) {
      const T* from = bias_grad + int64_t(q) * KEY_TILE;
      T* to = table_grad + query_offset(tile_query + q);
      for (int r = 0; r < run_count; ++r) add(to + runs[r].offset, from + runs[r].key, runs[r].length);
    }
  }

  // -- gathering --

  template <int WRITE>
  INLINE void prefetch(const void* base, int64_t offset) const {
    const char* at = reinterpret_cast<const char*>(static_cast<const Element*>(base) + offset);
    for (int64_t i = 0; i < p.width * int64_t(sizeof(Element)); i += 64) __builtin_prefetch(at + i, WRITE, 2);
  }
  INLINE void ask_for_row(int64_t token, int head) const {
    for (int part = 0; part < 3; ++part) prefetch<0>(call.qkv, p.qkv_offset(token, part, head));
    if (!backward) return;
    prefetch<0>(call.grad_out, p.out_offset(token, head));
    prefetch<0>(call.out, p.out_offset(token, head));
  }
  // While other things are computed: where a token's results will be written, and what the next window in its place reads.
  INLINE void ask_ahead(const Window& w, int t) const {
    const int64_t token = w.token[t];
    if (token >= 0 && !backward) prefetch<1>(call.out, p.out_offset(token, head));
    for (int part = 0; part < 3 && token >= 0 && backward; ++part)
      prefetch<1>(call.grad_qkv, p.qkv_offset(token, part, head));
    if (w.coming[t] >= 0) ask_for_row(w.coming[t], coming_head);
  }

  // Rows of unit length (or as they are, if inverse is null) as words: `rows`, and `columns` when it is another form.
  void gather(const Element* base, int64_t token_size, int64_t offset, const Window& w, T* inverse, T* rows, T* columns) {
    constexpr int usual = 32 / LANE;  // a head width that the compiler shall know
    if (width == usual * LANE) gather_vectors(usual, base, token_size, offset, w, inverse, rows, columns);
    else gather_vectors(width / LANE, base, token_size, offset, w, inverse, rows, columns);
  }
  INLINE void gather_vectors(const int vectors, const Element* base, int64_t token_size, int64_t offset, const Window& w,
                             T* inverse, T* rows, T* columns) {
    for (int t = 0; t < tokens; t += W::SIZE) {
      Vec<T> x[W::SIZE][MAX_WIDTH / LANE];
      for (int i = 0; i < W::SIZE; ++i) {
        const int64_t token = t + i < tokens ? w.token[t + i] : -1;
        if (token < 0) {
          for (int j = 0; j < vectors; ++j) x[i][j] = Vec<T>{};
          if (inverse && t + i < tokens) inverse[t + i] = 1;
        } else {
          const Element* from = base + token * token_size + offset;
          Vec<T> squares{};
          for (int j = 0; j < vectors; ++j) {
            x[i][j] = load_part(from + j * LANE, p.width - j * LANE);
            squares += x[i][j] * x[i][j];
          }
          if (inverse) {
            const T length = root(sum<T>(squares));
            inverse[t + i] = 1 / (length == 0 ? T(1) : length < T(MIN_LENGTH) ? T(MIN_LENGTH) : length);
            for (int j = 0; j < vectors; ++j) x[i][j] *= inverse[t + i];
          }
        }
        if (rows)
          for (int j = 0; j < vectors; ++j) W::store_row(rows + int64_t(t + i) * words + j * LANE / W::SIZE, x[i][j]);
      }
      if constexpr (PAIR)
        if (columns)
          for (int j = 0; j < vectors; ++j)
            store(columns + int64_t(t / 2) * vectors * LANE + j * LANE, W::join(x[0][j], x[1][j]));
    }
  }

  // Where the window's tokens lie.
  void place_window(Window& w, int64_t number) {
    const Place place = p.window_place(number % p.windows());
    place_tokens(w.token, number);
    w.masked = p.crosses_regions(place) || p.has_absent(place);
    if (!w.masked) return;
    for (int t = 0; t < tokens; ++t) {
      w.region[t] = T(p.region(place, p.token_place(t)));
      w.hidden[t] = w.token[t] < 0 ? -INF : T(0);
    }
  }
  void place_tokens(int64_t* token, int64_t number) const {
    const int64_t image = number / p.windows();
    const Place place = p.window_place(number % p.windows());
    Place at;
    for (at.at[0] = 0; at.at[0] < p.window[0]; ++at.at[0])
      for (at.at[1] = 0; at.at[1] < p.window[1]; ++at.at[1])
        for (at.at[2] = 0; at.at[2] < p.window[2]; ++at.at[2]) *token++ = p.token_index(image, place, at);
  }

  void enter_window(Window& w) {
    const Element* qkv = static_cast<const Element*>(call.qkv);
    const int64_t size = 3 * int64_t(p.heads) * p.width, part = int64_t(p.heads) * p.width, first = int64_t(head) * p.width;
    gather(qkv, size, first, w, w.q_inverse, w.q_rows, backward ? w.q_columns : nullptr);
    gather(qkv, size, first + part, w, w.k_inverse, w.k_rows, backward ? w.k_columns : nullptr);
    transpose(padded, words, w.k_rows, w.k_transposed);
    if (!backward) {
      gather(qkv, size, first + 2 * part, w, nullptr, PAIR ? nullptr : w.v_columns, w.v_columns);
    } else {
      gather(qkv, size, first + 2 * part, w, nullptr, w.v_columns, nullptr);
      transpose(padded, words, w.v_columns, w.v_transposed);
      const Element *grad = static_cast<const Element*>(call.grad_out), *out = static_cast<const Element*>(call.out);
      gather(grad, part, first, w, nullptr, w.g_rows, w.g_columns);
      transpose(token_words, width, w.q_columns, w.q_across);
      transpose(token_words, width, w.g_columns, w.g_across);
      for (int t = 0; t < tokens; ++t) {
        w.lse[t] = INF, w.delta[t] = w.grad_sum[t] = w.mean[t] = 0;  // an absent query has no probabilities
        if (w.token[t] < 0) continue;
        w.lse[t] = static_cast<const T*>(call.lse)[p.row_offset(w.token[t], head)] * T(LOG2_E) - bound;
        Vec<T> total{};
        const int64_t row = p.out_offset(w.token[t], head);
        for (int j = 0; j < p.width; j += LANE)
          total += load_part(grad + row + j, p.width - j) * load_part(out + row + j, p.width - j);
        w.delta[t] = sum<T>(total);
      }
      memset(w.grad_q, 0, sizeof(T) * int64_t(padded) * width);
      memset(w.grad_k, 0, sizeof(T) * int64_t(padded) * width);
      memset(w.grad_v, 0, sizeof(T) * int64_t(padded) * width);
    }
  }

  // -- products and logits in registers --

  // work(first key, Count) over the vectors of `keys` keys, three or two at a time, one if there is no more.
  template <int N>
  struct Count {
    static constexpr int value = N;
  };
  static INLINE void over_vectors(int keys, auto work) {
    int vectors = keys / LANE, key = 0;
    for (; vectors > 4 || vectors == 3; vectors -= 3, key += 3 * LANE) work(key, Count<3>());
    for (; vectors > 1; vectors -= 2, key += 2 * LANE) work(key, Count<2>());
    if (vectors) work(key, Count<1>());
  }

  // x = rows of queries (or gradients) times neighbouring keys (or values), which are transposed.
  template <int ROWS, int VECTORS>
  INLINE void multiply(const T* const (&rows)[ROWS], const T* transposed, Vec<T> (&x)[ROWS][VECTORS]) const {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < VECTORS; ++j) x[r][j] = Vec<T>{};
    for (int word = 0; word < p.width / W::SIZE; ++word, transposed += padded) {
      Vec<T> right[VECTORS];
#pragma GCC unroll 3
      for (int j = 0; j < VECTORS; ++j) right[j] = load(transposed + j * LANE);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Vec<T> left = splat(rows[r][word]);
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; ++j) x[r][j] = W::multiply_add(left, right[j], x[r][j]);
      }
    }
  }

  template <bool MASKED>
  INLINE Vec<T> logit(const Window& w, Vec<T> product, const T* bias_row, int key, int k, T factor, T region) const {
    Vec<T> x = product * factor + load(bias_row + k);
    if (MASKED) {
      const T penalty = T(p.mask_value) * T(LOG2_E);
      x += load(w.hidden + key + k) + (load(w.region + key + k) != region ? splat(penalty) : Vec<T>{});
    }
    return x;
  }

  // -- forward --

  // Online softmax, where logits are not bounded: the largest logit of each row so far is its origin.
  template <bool MASKED>
  void raise_origins(const Window& w, int query, int key, int rows, int keys) {
    const T factor = scale * T(LOG2_E);
    for (int q = 0; q < rows; ++q) {
      const T region = MASKED ? w.region[query + q] : T(0);
      Vec<T> tops = splat(T(-INF));
      for (int k = 0; k < keys; k += LANE) {
        const int64_t row = int64_t(q) * KEY_TILE;
        const Vec<T> x = logit<MASKED>(w, load(logits + row + k), bias + row, key, k, factor, region);
        tops = x > tops ? x : tops;
      }
      const T before = w.origin[q], top = largest<T>(tops);
      if (!(top > before) && key > 0) continue;
      w.origin[q] = top == -INF ? T(LEAST) : top;  // a row that is hidden so far must not give NaN
      if (key == 0) continue;
      const Vec<T> fade = exp2(splat(before - w.origin[q]));
      store(w.total + q * LANE, load(w.total + q * LANE) * fade);
      for (int j = 0; j < width; j += LANE) store(w.out + q * width + j, load(w.out + q * width + j) * fade);
    }
  }

  // Probabilities of a tile, up to the factor that a row's sum and origin keep, as words of keys in `left`. Products are
  // in `logits`, or made here.
  template <bool MASKED, bool BOUNDED>
  void softmax(const Window& w, int query, int key, int rows, int keys) {
    constexpr bool STORED = TILES || !BOUNDED;
    if (!BOUNDED) raise_origins<MASKED>(w, query, key, rows, keys);
    const T factor = scale * T(LOG2_E);
    for (int first = 0; first < rows; first += STRIP) {
      const int count = least(STRIP, rows - first);
      Vec<T> totals[STRIP];
      const T* q_rows[STRIP];  // the last again for those that do not exist
      for (int i = 0; i < STRIP; ++i) {
        const int q = first + least(i, count - 1);
        if (key == 0 && i < count) ask_ahead(w, query + q);
        totals[i] = key == 0 ? Vec<T>{} : load(w.total + q * LANE);
        q_rows[i] = w.q_rows + int64_t(query + q) * words;
      }
      over_vectors(keys, [&](int k, auto vectors) __attribute__((always_inline)) {
        constexpr int VECTORS = decltype(vectors)::value;
        Vec<T> products[STRIP][VECTORS];
        if constexpr (!STORED) multiply(q_rows, w.k_transposed + key + k, products);
#pragma GCC unroll 4
        for (int i = 0; i < STRIP; ++i) {
          if (i >= count) break;
          const int64_t q = first + i, row = q * KEY_TILE;
          const T region = MASKED ? w.region[query + q] : T(0);
#pragma GCC unroll 3
          for (int j = 0; j < VECTORS; ++j) {
            const int at = k + j * LANE;
            const Vec<T> product = STORED ? load(logits + row + at) : products[i][j];
            Vec<T> x = logit<MASKED>(w, product, bias + row, key, at, factor, region);
            if (!BOUNDED) x -= w.origin[q];
            x = exp2(x);
            totals[i] += x;
            W::store_row(left + q * WORD_TILE + at / W::SIZE, x);
          }
        }
      });
      for (int i = 0; i < count; ++i) store(w.total + (first + i) * LANE, totals[i]);
    }
  }

  void write_out(const Window& w, int query, int rows) const {
    for (int q = 0; q < rows; ++q) {
      const int64_t token = w.token[query + q];
      if (token < 0) continue;
      Element* to = static_cast<Element*>(call.out) + p.out_offset(token, head);
      const T total = sum<T>(load(w.total + q * LANE)), factor = 1 / total;
      for (int j = 0; j < p.width; j += LANE) store_part(to + j, load(w.out + q * width + j) * factor, p.width - j);
      static_cast<T*>(call.lse)[p.row_offset(token, head)] = (bound + (bounded ? T(0) : w.origin[q]) + log2_of(total)) * T(LN_2);
    }
  }

  void forward_group(int count) {
    for (int query = 0; query < tokens; query += query_tile) {
      const int rows = least(query_tile, tokens - query);
      for (int key = 0; key < padded; key += key_tile) {
        const int keys = least(key_tile, padded - key);
        enter_tile(query, key, rows, keys);
        for (int i = 0; i < count; ++i) {
          Window& w = windows[i];
          if (TILES || !bounded)
            product<PAIR, false>(rows, keys, w.q_rows + int64_t(query) * words, words, w.k_transposed + key, padded,
                                 p.width / W::SIZE, logits, KEY_TILE);
          if (bounded && w.masked) softmax<true, true>(w, query, key, rows, keys);
          else if (bounded) softmax<false, true>(w, query, key, rows, keys);
          else if (w.masked) softmax<true, false>(w, query, key, rows, keys);
          else softmax<false, false>(w, query, key, rows, keys);
          const T* values = w.v_columns + int64_t(key / W::SIZE) * width;
          if (key == 0) product<PAIR, false>(rows, width, left, WORD_TILE, values, width, keys / W::SIZE, w.out, width);
          else product<PAIR, true>(rows, width, left, WORD_TILE, values, width, keys / W::SIZE, w.out, width);
        }
      }
      for (int i = 0; i < count; ++i) write_out(windows[i], query, rows);
    }
  }

  // -- backward --

  // Probabilities and gradients of logits of a tile, as words of keys (`left`, gradients only) and of queries. Products
  // q·k and grad_out·v are in `logits` and `grads`, or made here.
  template <bool MASKED>
  void softmax_backward(const Window& w, int query, int key, int rows, int keys) {
    const T factor = scale * T(LOG2_E);
    for (int first = 0; first < rows; first += TWO) {
      const int count = least(TWO, rows - first);
      Vec<T> moments[TWO] = {}, grad_sums[TWO] = {}, means[TWO] = {};
      const T *q_rows[TWO], *g_rows[TWO];  // the last again for one that does not exist
      for (int i = 0; i < TWO; ++i) {
        const int q = query + first + least(i, count - 1);
        if (key == 0 && i < count) ask_ahead(w, q);
        q_rows[i] = w.q_rows + int64_t(q) * words, g_rows[i] = w.g_rows + int64_t(q) * words;
      }
      over_vectors(keys, [&](int k, auto vectors) __attribute__((always_inline)) {
        constexpr int VECTORS = decltype(vectors)::value;
        Vec<T> cosines[TWO][VECTORS], slopes[TWO][VECTORS];
        if constexpr (!TILES) {
          multiply(q_rows, w.k_transposed + key + k, cosines);
          multiply(g_rows, w.v_transposed + key + k, slopes);
        }
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; ++j) {
          const int at = k + j * LANE;
          Vec<T> probability[TWO] = {}, grad[TWO] = {};
#pragma GCC unroll 2
          for (int i = 0; i < TWO; ++i) {
            if (i >= count) break;
            const int q = query + first + i;
            const int64_t row = int64_t(first + i) * KEY_TILE;
            const Vec<T> cosine = TILES ? load(logits + row + at) : cosines[i][j];
            const Vec<T> slope = TILES ? load(grads + row + at) : slopes[i][j];
            const Vec<T> x = logit<MASKED>(w, cosine, bias + row, key, at, factor, MASKED ? w.region[q] : T(0));
            probability[i] = exp2(x - w.lse[q]);
            grad[i] = probability[i] * (slope - w.delta[q]);
            moments[i] += grad[i] * cosine;
            means[i] += probability[i] * cosine;
            grad_sums[i] += grad[i];
            store(bias_grad + row + at, load(bias_grad + row + at) + grad[i]);
            W::store_row(left + int64_t(first + i) * WORD_TILE + at / W::SIZE, grad[i]);
            if (!PAIR) store(pairs + row + at, probability[i]);
          }
          if constexpr (PAIR) {
            store(pairs + int64_t(first / 2) * KEY_TILE + at, W::join(probability[0], probability[1]));
            store(grad_pairs + int64_t(first / 2) * KEY_TILE + at, W::join(grad[0], grad[1]));
          }
        }
      });
      for (int i = 0; i < count; ++i) {
        w.mean[query + first + i] += sum<T>(means[i]);
        w.grad_sum[query + first + i] += sum<T>(grad_sums[i]);
        scale_grad += sum<T>(moments[i]);
      }
    }
  }

  // Gradient of x from that of x / length, where length is constant 1 for 0, and constant below the smallest length.
  void write_unit_grad(const Element* from, Element* to, const T* grad, T inverse) const {
    const bool free = inverse * T(MIN_LENGTH) < T(0.999999);
    Vec<T> along{}, squares{};
    for (int j = 0; j < p.width; j += LANE) {
      const Vec<T> x = load_part(from + j, p.width - j);
      along += x * load(grad + j);
      squares += x * x;
    }
    const bool moves = free && sum<T>(squares) != 0;
    const T factor = moves ? sum<T>(along) * inverse * inverse : T(0);
    for (int j = 0; j < p.width; j += LANE) {
      const Vec<T> x = load_part(from + j, p.width - j);
      store_part(to + j, (load(grad + j) - x * factor) * (scale * inverse), p.width - j);
    }
  }

  void write_grads(const Window& w) {
    const Element* qkv = static_cast<const Element*>(call.qkv);
    Element* grad = static_cast<Element*>(call.grad_qkv);
    transpose(width, padded, w.grad_k, grad_k_rows);
    transpose(width, padded, w.grad_v, grad_v_rows);
    for (int t = 0; t < tokens; ++t) {
      if (w.token[t] < 0) continue;
      const int64_t q = p.qkv_offset(w.token[t], 0, head), k = p.qkv_offset(w.token[t], 1, head);
      const int64_t v = p.qkv_offset(w.token[t], 2, head), row = int64_t(t) * width;
      write_unit_grad(qkv + q, grad + q, w.grad_q + row, w.q_inverse[t]);
      write_unit_grad(qkv + k, grad + k, grad_k_rows + row, w.k_inverse[t]);
      for (int j = 0; j < p.width; j += LANE) store_part(grad + v + j, load(grad_v_rows + row + j), p.width - j);
    }
  }

  void backward_group(int count) {
    for (int query = 0; query < tokens; query += query_tile) {
      const int rows = least(query_tile, tokens - query), steps = (rows + W::SIZE - 1) / W::SIZE;
      const int64_t row = int64_t(query) * words, word = query / W::SIZE;
      if constexpr (GRAIN > LANE)  // tiles read whole: what follows the last words of queries is zero
        for (T *at = pairs + int64_t(steps) * KEY_TILE, *end = pairs + int64_t(up_to(steps, LANE)) * KEY_TILE; at < end; ++at)
          at[0] = at[grad_pairs - pairs] = 0;
      for (int key = 0; key < padded; key += key_tile) {
        const int keys = least(key_tile, padded - key);
        enter_tile(query, key, rows, keys);
        for (int i = 0; i < count; ++i) {
          Window& w = windows[i];
          if (TILES) {
            product<PAIR, false>(rows, keys, w.q_rows + row, words, w.k_transposed + key, padded, p.width / W::SIZE, logits,
                                 KEY_TILE);
            product<PAIR, false>(rows, keys, w.g_rows + row, words, w.v_transposed + key, padded, p.width / W::SIZE, grads,
                                 KEY_TILE);
          }
          if (w.masked) softmax_backward<true>(w, query, key, rows, keys);
          else softmax_backward<false>(w, query, key, rows, keys);
          product<PAIR, true>(width, keys, w.g_across + word, token_words, pairs, KEY_TILE, steps, w.grad_v + key, padded);
          product<PAIR, true>(width, keys, w.q_across + word, token_words, PAIR ? grad_pairs : left, KEY_TILE, steps,
                              w.grad_k + key, padded);
          product<PAIR, true>(rows, width, left, WORD_TILE, w.k_columns + int64_t(key / W::SIZE) * width, width,
                              keys / W::SIZE, w.grad_q + int64_t(query) * width, width);
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      const Window& w = windows[i];
      write_grads(w);
      // Gradients of a row's logits sum to zero, but for the rounding of `out` in delta, which the sum over rows would keep.
      for (int t = 0; t < tokens; ++t) scale_grad -= double(w.grad_sum[t]) * w.mean[t];
    }
  }

  // -- all windows of a chunk --

  void run(int64_t task) {
    const int64_t chunk = task / p.heads, all = p.batch * p.windows();
    const int64_t first = all * chunk / call.chunks, last = all * (chunk + 1) / call.chunks;
#if defined(__AMX_BF16__)
    const tiles::Tiles held;
#endif
    enter_head(int(task % p.heads));
    for (int64_t number = first; number < last; number += group) {
      const int count = int(last - number < group ? last - number : group);
      for (int i = 0; i < count; ++i) place_window(windows[i], number + i);
      // Rows are far apart in memory: the first ones are asked for before they are read, others during the products.
      for (int i = 0; i < count && number == first; ++i)
        for (int t = 0; t < tokens; ++t)
          if (windows[i].token[t] >= 0) ask_for_row(windows[i].token[t], head);
      for (int i = 0; i < count; ++i) enter_window(windows[i]);
      const bool ends = number + group >= last;
      const int64_t coming = ends ? first : number + group;  // then the next task, probably the next head's
      coming_head = head + ends;
      for (int i = 0; i < count; ++i) {
        if (coming + i < last && coming_head < p.heads) place_tokens(windows[i].coming, coming + i);
        else for (int t = 0; t < tokens; ++t) windows[i].coming[t] = -1;
      }
      if (backward) backward_group(count);
      else forward_group(count);
    }
    if (!backward) return;
    leave_tile();
    const int64_t offsets = p.offsets();
    T* to = static_cast<T*>(call.bias_partials) + task * offsets;
    for (int64_t i = 0; i < offsets; ++i) to[i] = table_grad[offsets - 1 - i];
    const T log_scale = static_cast<const T*>(call.logit_scale)[head];
    static_cast<T*>(call.scale_partials)[task] = log_scale > T(MAX_LOGIT_SCALE) ? T(0) : T(scale_grad * scale);
  }
};

template <class Element, class T, bool PAIR>
constexpr Kernel kernel = {
    [](const Problem& p) { return Task<Element, T, PAIR>::scratch_bytes(p); },
    [](const Call& call, int64_t task, void* scratch) { Task<Element, T, PAIR>(call, false, scratch).run(task); },
    [](const Call& call, int64_t task, void* scratch) { Task<Element, T, PAIR>(call, true, scratch).run(task); },
};

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

}  // namespace

extern const InstructionSet INSTRUCTION_SET = {
    kernel<float, float, false>,
    kernel<BFloat16, float, PAIRS>,
    kernel<Float16, float, false>,
    kernel<double, double, false>,
};

}  // namespace cosine_window_attention
