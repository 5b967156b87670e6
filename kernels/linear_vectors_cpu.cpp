// The products of a linear layer and its gradients, x · weightᵀ + bias, grad · weight and gradᵀ · x, in bfloat16 and
// float32, by vectors: for processors that have dot products of bfloat16 pairs, but no AMX tiles.
//
// All three are the same: a left matrix whose words are handed to all lanes, one by one, times a right one in panels of 32
// columns. A word is 32 bits: one float32, or two bfloat16 that are neighbours in what is summed over. 8 rows × 32 columns
// of sums stay in 16 registers; for each word of a row there are two products, so that 8 words and a line of the panel take
// 10 loads for 16 products, and a core multiplies in every cycle.
//
// The panels that a task uses stay in the second cache. In the products of a map the left matrix is that map as it lies in
// memory, and the weight is laid out as panels before. In the gradient of a weight both maps are laid out, some tokens at
// a time.
//
// What is summed in which order depends on the shapes alone: results are the same at any number of threads.

#include "linear_vectors_cpu.h"

#include "words.h"

namespace swinv2_linear_vectors {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
namespace {

using namespace vectors;
using namespace words;

typedef uint32_t Word;

constexpr int ROWS = 8, COLUMNS = 32;   // of a square of sums
constexpr int LINE = 16;                // words
constexpr int BAND = 32;                // rows of a weight that are laid out at a time
constexpr int CACHE = 1 << 19;          // bytes of panels: half of the second cache
constexpr int WORDS = 128;              // of tokens, that a task of a weight's gradient lays out at a time
constexpr int LEFT = 512, RIGHT = 512;  // channels of such a task, at most
constexpr int GAP = LINE;               // words between panels of rows: else all fall into one set of the first cache
constexpr int SOON = 6;                 // words of a column from one that is laid out to one that is asked for

template <class Element>
constexpr int PER_WORD = sizeof(Word) / sizeof(Element);
template <class Element>
constexpr Word ONE = sizeof(Element) == 2 ? 0x3f803f80 : 0x3f800000;

template <class Element>
constexpr int DEPTH = sizeof(Element) == 2 ? 1024 : 256;  // words that are summed before they are added to the rest

template <class Element>
INLINE Vec<float> mad(__m512i a, __m512i b, Vec<float> sum) {
  if constexpr (sizeof(Element) == 2) return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}

// left · panel over `words`; left(row, word) is one of the left matrix, take(row, sums, sums) gets 32 numbers of the result.
template <class Element, class Left, class Take>
INLINE void multiply(const Left& left, const Word* panel, int words, const Take& take) {
  Vec<float> sums[ROWS][2] = {};
  for (int word = 0; word < words; ++word, panel += COLUMNS) {
    const __m512i first = _mm512_load_si512(panel), last = _mm512_load_si512(panel + LINE);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const __m512i x = _mm512_set1_epi32(left(row, word));
      sums[row][0] = mad<Element>(x, first, sums[row][0]);
      sums[row][1] = mad<Element>(x, last, sums[row][1]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) take(row, sums[row][0], sums[row][1]);
}

// What `multiply` does with a square of sums that others are added to: the first time it is written.
INLINE auto into(float* square, bool add) {
  return [=](int row, Vec<float> a, Vec<float> b) {
    float* at = square + row * COLUMNS;
    store(at, add ? load(at) + a : a), store(at + LINE, add ? load(at + LINE) + b : b);
  };
}

// 32 neighbours of a row.
template <class Element>
INLINE void store_row(Element* to, Vec<float> a, Vec<float> b) {
  if constexpr (sizeof(Element) == 2)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  else
    store(to, a), store(to + LINE, b);
}

// A word of each of 32 columns, from one row in float32, two in bfloat16; the second may not exist, and is zero then.
template <class Element>
INLINE Pairs words_from(const Element* row, int64_t stride, bool both) {
  if constexpr (sizeof(Element) == 2)
    return pairs(_mm512_loadu_si512(row), both ? _mm512_loadu_si512(row + stride) : _mm512_setzero_si512());
  return {_mm512_loadu_si512(row), _mm512_loadu_si512(row + LINE)};
}

// -- products of a map ---------------------------------------------------------------------------------------------------

using Product = swinv2_linear::Call;

template <class Element>
INLINE int words_of(const Product& call) {
  return call.inputs / PER_WORD<Element>;
}

template <class Element>
INLINE Word* panel_of(const Product& call, int64_t panel) {
  return static_cast<Word*>(call.panels) + panel * words_of<Element>(call) * COLUMNS;
}

template <class Element>
void lay_out(const Product& call, int64_t band) {
  const int words = words_of<Element>(call);
  if (call.transposed) {
    const Word* from = static_cast<const Word*>(call.weight) + band * BAND * words;
    Word* to = panel_of<Element>(call, band);
    for (int word = 0; word < words; word += LINE)
      for (int half = 0; half < 2; ++half) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + (16 * half + i) * int64_t(words) + word);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (word + i) * COLUMNS + LINE * half, rows[i]);
      }
  } else {
    const Element* from = static_cast<const Element*>(call.weight) + band * BAND * call.outputs;
    for (int panel = 0; panel < call.outputs / COLUMNS; ++panel, from += COLUMNS) {
      Word* to = panel_of<Element>(call, panel) + band * (BAND / PER_WORD<Element>)*COLUMNS;
      for (int row = 0; row < BAND; row += PER_WORD<Element>, to += COLUMNS) {
        const Pairs line = words_from(from + row * int64_t(call.outputs), call.outputs, true);
        _mm512_store_si512(to, line.first), _mm512_store_si512(to + LINE, line.last);
      }
    }
  }
}

// Panels are shared out in blocks that fit into the cache.
template <class Element>
struct Blocks {
  int panels, each, count;

  explicit Blocks(const Product& call) : panels(call.outputs / COLUMNS) {
    const int fit = most(1, CACHE / int(words_of<Element>(call) * COLUMNS * sizeof(Word)));
    each = over(panels, over(panels, fit)), count = over(panels, each);
  }
};

template <class Element>
int64_t tasks(const Product& call) {
  return Blocks<Element>(call).count * call.chunks;
}

template <class Element>
void task(const Product& call, int64_t number) {
  const Blocks<Element> blocks(call);
  const int words = words_of<Element>(call);
  const int first = int(number / call.chunks) * blocks.each, last = least(blocks.panels, first + blocks.each);
  const int64_t chunk = number % call.chunks, strips = (call.rows + ROWS - 1) / ROWS;
  alignas(64) float square[ROWS * COLUMNS];
  for (int64_t strip = strips * chunk / call.chunks; strip < strips * (chunk + 1) / call.chunks; ++strip) {
    const int rows = call.rows - strip * ROWS < ROWS ? int(call.rows - strip * ROWS) : ROWS;
    const Word* x[ROWS];  // the last again for those that do not exist
    for (int row = 0; row < ROWS; ++row)
      x[row] = static_cast<const Word*>(call.x) + (strip * ROWS + least(row, rows - 1)) * words;
    for (int panel = first; panel < last; ++panel) {
      const int column = panel * COLUMNS;
      Element* out = static_cast<Element*>(call.out) + strip * ROWS * call.outputs + column;
      for (int row = 0; row < rows; ++row)
        for (int i = 0; i < COLUMNS; i += LINE * PER_WORD<Element>)
          __builtin_prefetch(out + row * int64_t(call.outputs) + i, 1);
      Vec<float> bias[2] = {};
      for (int half = 0; half < 2 && call.bias; ++half)
        bias[half] = load_wide(static_cast<const Element*>(call.bias) + column + LINE * half);
      const Word* weight = panel_of<Element>(call, panel);
      int word = 0;
      const auto left = [&](int row, int i) { return x[row][word + i]; };
      for (; words - word > DEPTH<Element>; word += DEPTH<Element>, weight += DEPTH<Element> * COLUMNS)
        multiply<Element>(left, weight, DEPTH<Element>, into(square, word > 0));
      multiply<Element>(left, weight, words - word, [&](int row, Vec<float> a, Vec<float> b) {
        const float* before = square + row * COLUMNS;
        if (word > 0) a += load(before), b += load(before + LINE);
        if (row < rows) store_row(out + row * int64_t(call.outputs), a + bias[0], b + bias[1]);
      });
    }
  }
}

// -- gradient of a weight ------------------------------------------------------------------------------------------------

using Gradient = swinv2_weight_gradient::Call;

struct Room {  // of a thread, for as long as it lives
  alignas(64) Word left[(WORDS * ROWS + GAP) * LEFT / ROWS], right[WORDS * COLUMNS];
  alignas(64) float sums[LEFT * RIGHT], bias[LEFT], part[LEFT];  // of all tokens; of those that are laid out
};

// Tokens of a map as words in panels of WIDE columns, (columns / WIDE, words, WIDE); adds those of a column to `sums`,
// unless it is null.
template <int WIDE, class Element>
void lay_out(const Element* map, int64_t stride, int columns, int64_t tokens, int words, Word* panels, float* sums) {
  constexpr int EACH = PER_WORD<Element>;
  const int apart = WIDE * words + GAP;
  for (int word = 0; word < words; ++word, map += EACH * stride, tokens -= EACH)
    for (int column = 0; column < columns; column += COLUMNS) {
      const Element* later = map + column + SOON * EACH * stride;
      _mm_prefetch(later, _MM_HINT_T0), _mm_prefetch(EACH == 2 ? later + stride : later + LINE, _MM_HINT_T0);
      const Pairs pair = words_from(map + column, stride, tokens > 1);
      Word* to = panels + column / WIDE * apart + word * WIDE;
      for (int half = 0; half < 2; ++half) {
        const __m512i line = half ? pair.last : pair.first;
        if constexpr (WIDE == ROWS) {
          _mm256_store_si256((__m256i*)(to + 2 * half * apart), _mm512_castsi512_si256(line));
          _mm256_store_si256((__m256i*)(to + (2 * half + 1) * apart), _mm512_extracti64x4_epi64(line, 1));
        } else {
          _mm512_store_si512(to + half * LINE, line);
        }
        if (!sums) continue;
        float* sum = sums + column + half * LINE;
        store(sum, mad<Element>(line, _mm512_set1_epi32(ONE<Element>), load(sum)));
      }
    }
}

// Tokens of a map that are wanted soon; their lines are asked for in parts.
template <class Element>
struct Ahead {
  const Element* map;
  int64_t stride;
  int columns, column = 0, asked = 0;

  Ahead(const Element* map, int64_t stride, int columns) : map(map), stride(stride), columns(columns) {}

  // So that part / all of `tokens` are on their way.
  INLINE void ask(int64_t tokens, int64_t part, int64_t all) {
    constexpr int EACH = 64 / sizeof(Element);
    for (const int until = int(tokens * (columns / EACH) * part / all); asked < until; ++asked) {
      _mm_prefetch(map + column, _MM_HINT_T1);
      if ((column += EACH) == columns) column = 0, map += stride;
    }
  }
};

// Rows of 32 sums, over all chunks, whose sums lie `size` apart, to where they belong in the gradient.
template <class Element>
void store_rows(const float* sums, int64_t chunks, int64_t size, int rows, Element* out, int64_t stride) {
  for (int row = 0; row < rows; ++row, sums += COLUMNS, out += stride) {
    Vec<float> a{}, b{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) a += load(sums + chunk * size), b += load(sums + chunk * size + LINE);
    store_row(out, a, b);
  }
}

// How many blocks the result is cut into: enough for all threads.
struct Cut {
  int rows, columns, down, across;

  explicit Cut(const Gradient& call) {
    cut(call, over(call.outputs, LEFT), over(call.inputs, RIGHT));
    while (!fills(call) && columns > 128) cut(call, down, across + 1);
    while (!fills(call) && rows > 128) cut(call, down + 1, across);
  }
  void cut(const Gradient& call, int parts_down, int parts_across) {
    rows = up_to(over(call.outputs, parts_down), 32), columns = up_to(over(call.inputs, parts_across), COLUMNS);
    down = parts_down, across = parts_across;
  }
  bool fills(const Gradient& call) const {
    const int64_t count = call.chunks * down * across;
    return count % call.threads == 0 || count >= 4 * call.threads;
  }
};

template <class Element>
int64_t gradient_tasks(const Gradient& call) {
  const Cut cut(call);
  return call.chunks * cut.down * cut.across;
}

template <class Element>
void gradient_task(const Gradient& call, int64_t number) {
  static thread_local Room* const room = new Room;
  const Cut cut(call);
  const int64_t chunk = number / (cut.across * cut.down);
  const int row = int(number / cut.across % cut.down) * cut.rows, column = int(number % cut.across) * cut.columns;
  const int rows = least(cut.rows, call.outputs - row), columns = least(cut.columns, call.inputs - column);
  if (rows <= 0 || columns <= 0) return;  // the blocks before have all of it
  const int64_t begin = call.tokens * chunk / call.chunks, end = call.tokens * (chunk + 1) / call.chunks;
  const Element* left = static_cast<const Element*>(call.grad) + begin * call.outputs + row;
  const Element* right = static_cast<const Element*>(call.x) + begin * call.inputs + column;
  Element* out = static_cast<Element*>(call.weight_grad) + row * int64_t(call.inputs) + column;
  const bool adds = column == 0;  // the sums of grad's rows: only one of the tasks that have these
  float* const bias = call.bias_parts + chunk * call.outputs + row;
  if (adds && call.continues) memcpy(room->bias, bias, rows * sizeof(float));
  else if (adds) memset(room->bias, 0, sizeof room->bias);
  // A panel's sums lie together: (panels, rows, 32). The only chunk's stay with the thread, in the cache.
  const auto sums_of = [&](int panel) {
    if (!call.weight_parts) return room->sums + panel * rows * COLUMNS;
    return call.weight_parts + chunk * call.outputs * call.inputs +
           (int64_t(column / COLUMNS + panel) * call.outputs + row) * COLUMNS;
  };
  constexpr int TOKENS = WORDS * PER_WORD<Element>;
  const int panels = columns / COLUMNS;
  const auto tokens_at = [&](int64_t token) { return end - token < TOKENS ? int(end - token) : TOKENS; };
  for (int64_t token = begin; token < end; token += TOKENS, left += TOKENS * call.outputs, right += TOKENS * call.inputs) {
    const int tokens = tokens_at(token), next = tokens_at(token + tokens), words = over(tokens, PER_WORD<Element>);
    if (adds) memset(room->part, 0, sizeof room->part);
    lay_out<ROWS>(left, call.outputs, rows, tokens, words, room->left, adds ? room->part : nullptr);
    if (adds) add(room->bias, room->part, rows);
    Ahead of_left(left + TOKENS * call.outputs, call.outputs, rows);
    for (int panel = 0; panel < panels; ++panel) {
      const bool last = panel + 1 == panels;
      const Element* here = right + panel * COLUMNS;
      lay_out<COLUMNS>(here, call.inputs, COLUMNS, tokens, words, room->right, nullptr);
      Ahead of_right(last ? right + TOKENS * call.inputs : here + COLUMNS, call.inputs, COLUMNS);
      float* square = sums_of(panel);
      for (int done = 0; done < rows; done += ROWS, square += ROWS * COLUMNS) {
        of_right.ask(last ? next : tokens, done + ROWS, rows);
        of_left.ask(next, panel * rows + done + ROWS, panels * rows);
        const Word* here = room->left + done / ROWS * (ROWS * words + GAP);
        for (int i = 0; i < ROWS * COLUMNS; i += LINE) _mm_prefetch(square + i, _MM_HINT_T0);  // to be added to
        const auto word_at = [&](int i, int word) { return here[word * ROWS + i]; };
        multiply<Element>(word_at, room->right, words, into(square, call.continues || token > begin));
      }
    }
  }
  for (int panel = 0; panel < panels && !call.weight_parts; ++panel)
    store_rows(sums_of(panel), 1, 0, rows, out + panel * COLUMNS, call.inputs);
  if (adds) memcpy(bias, room->bias, rows * sizeof(float));
}

template <class Element>
void add_parts(const Gradient& call, int64_t square) {
  const int64_t across = call.inputs / COLUMNS, row = square / across * BAND, panel = square % across;
  Element* out = static_cast<Element*>(call.weight_grad) + row * call.inputs + panel * COLUMNS;
  store_rows(call.weight_parts + (panel * call.outputs + row) * COLUMNS, call.chunks, int64_t(call.outputs) * call.inputs, BAND,
             out, call.inputs);
}

template <class Element>
constexpr Kernels KERNELS = {{lay_out<Element>, tasks<Element>, task<Element>},
                             {gradient_tasks<Element>, gradient_task<Element>, add_parts<Element>}};

}  // namespace

extern const Types INSTRUCTION_SET = {KERNELS<BFloat16>, KERNELS<float>};
#else
extern const Types INSTRUCTION_SET = {};
#endif

}  // namespace swinv2_linear_vectors
