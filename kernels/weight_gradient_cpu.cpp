// The gradients of a linear layer's weight and bias, gradᵀ · x and the sum of grad's rows, in bfloat16 by AMX tiles.
//
// Tokens are what is summed over, and they are the rows of both maps. Tiles want them along the rows of the left matrix, and
// in pairs along the columns of the right one: 16 rows of 32 words, and 16 rows of 16 pairs. So a task, a block of the
// result over a chunk of the tokens, lays out some tokens of both maps as tiles at a time. Transposing takes longest: the
// left map is the one with fewer channels, and if that is x, it is the transposed result that is computed.
//
// Memory decides how fast it is. A block is as large as a core's second cache holds, so that maps are laid out few times; the
// left map's tiles stay there, the right one's come a strip at a time; while a strip is multiplied, the lines of the next,
// and of the left map's next tokens, are on their way; and sums lie square by square, each in memory of its own (4 KiB),
// not in rows whose lines would fall into the same few sets of the first cache.
//
// What is summed in which order depends on the shapes alone: results are the same at any number of threads. There is nothing
// here for processors without AMX.

#include "weight_gradient_cpu.h"

#include "tiles.h"
#include "vectors.h"

namespace swinv2_weight_gradient {

#if defined(__AMX_BF16__)
namespace {

using namespace tiles;
using namespace vectors;

constexpr int TOKENS = 256;             // that a task has in tiles at a time
constexpr int LEFT = 512, RIGHT = 512;  // channels of a task: its sums are 1 MiB, half of the second cache
constexpr int STRIP = 128;              // channels of the right map that are tiles at a time
constexpr int GAP = DEPTH;              // words between columns of right tiles: else all fall into one set of the first cache
constexpr int SQUARE = 32, SUMS = SQUARE * SQUARE;

struct Room {  // of a thread, for as long as it lives
  alignas(64) BFloat16 left[LEFT * TOKENS], right[STRIP * TOKENS + STRIP / 16 * GAP];
  alignas(64) float left_sums[16 * LEFT], right_sums[RIGHT], sums[LEFT * RIGHT];
};

// Two tokens of 32 channels, zeros for those that do not exist. The next tile's are on their way.
struct Two {
  __m512i a, b;
};
INLINE Two two(const BFloat16* token, int64_t stride, int64_t tokens) {
  _mm_prefetch(token + DEPTH * stride, _MM_HINT_T0);
  _mm_prefetch(token + (DEPTH + 1) * stride, _MM_HINT_T0);
  return {tokens > 0 ? _mm512_loadu_si512(token) : _mm512_setzero_si512(),
          tokens > 1 ? _mm512_loadu_si512(token + stride) : _mm512_setzero_si512()};
}

// Adds to 16 sums those of 16 pairs.
INLINE void add_pairs(float* sums, __m512i words) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  _mm512_store_ps(sums, _mm512_dpbf16_ps(_mm512_load_ps(sums), (__m512bh)words, ones));
}

// Tokens of a map as left tiles (channels / 16, steps, 16 channels, 32 tokens). `sums` (channels, 16), unless it is null,
// gets what adds up to each channel's sum.
void lay_out_left(const BFloat16* map, int64_t stride, int channels, int64_t tokens, int steps, BFloat16* tiles, float* sums) {
  for (int step = 0; step < steps; ++step)
    for (int channel = 0; channel < channels; channel += 32) {
      __m512i halves[2][16];
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair) {
        const int64_t token = step * DEPTH + 2 * pair;
        const Two t = two(map + token * stride + channel, stride, tokens - token);
        // Of each 8 channels the first four are in the first half.
        halves[0][pair] = _mm512_unpacklo_epi16(t.a, t.b), halves[1][pair] = _mm512_unpackhi_epi16(t.a, t.b);
      }
      for (int half = 0; half < 2; ++half) {
        transpose(halves[half]);
        for (int i = 0; i < 16; ++i) {
          const int at = channel + 8 * (i / 4) + 4 * half + i % 4;
          _mm512_store_si512(tiles + (at / 16 * steps + step) * TILE + at % 16 * DEPTH, halves[half][i]);
          if (sums) add_pairs(sums + 16 * at, halves[half][i]);
        }
      }
    }
}

// The same as right tiles (channels / 16, steps, 16 pairs of tokens, 16 channels), with gaps; `sums` (channels).
void lay_out_right(const BFloat16* map, int64_t stride, int channels, int64_t tokens, int steps, BFloat16* tiles, float* sums) {
  for (int pair = 0; pair < steps * 16; ++pair)
    for (int channel = 0; channel < channels; channel += 32) {
      const Two t = two(map + 2 * pair * stride + channel, stride, tokens - 2 * pair);
      const Pairs p = pairs(t.a, t.b);
      BFloat16* to = tiles + channel / 16 * (steps * TILE + GAP) + pair * DEPTH;
      _mm512_store_si512(to, p.first), _mm512_store_si512(to + steps * TILE + GAP, p.last);
      if (sums) add_pairs(sums + channel, p.first), add_pairs(sums + channel + 16, p.last);
    }
}

// Tokens of a map that are wanted soon: some lines of them are asked for at each step of a product.
struct Ahead {
  const BFloat16* map;
  int64_t stride;
  int channels, tokens, each, channel;

  Ahead(const BFloat16* map, int64_t stride, int channels, int tokens, int steps)
      : map(map), stride(stride), channels(channels), tokens(tokens), each(over(channels / 32 * tokens, steps)), channel(0) {}

  INLINE void step() {
    for (int i = 0; i < each && tokens > 0; ++i) {
      _mm_prefetch(map + channel, _MM_HINT_T1);
      if ((channel += 32) == channels) channel = 0, map += stride, --tokens;
    }
  }
};

// A square of sums, as four tiles: left · right over all steps, added to what is there or in its place.
INLINE void multiply(const BFloat16* left, const BFloat16* right, int steps, float* out, bool add, Ahead& one, Ahead& other) {
  const int64_t below = steps * TILE, beside = below + GAP;
  const int lines = over(64, steps);  // of the next square's sums
  if (add) {
    _tile_loadd(0, out, 64);
    _tile_loadd(1, out + 256, 64);
    _tile_loadd(2, out + 512, 64);
    _tile_loadd(3, out + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step, left += TILE, right += TILE) {
    one.step(), other.step();
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    ask_for(left + TILE, 16);
    _tile_loadd(7, right + beside, 64);
    _tile_dpbf16ps(1, 4, 7);
    ask_for(left + TILE + below, 16);
    _tile_loadd(5, left + below, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (add) ask_for(out + SUMS + step * lines * 16, lines);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 64);
  _tile_stored(1, out + 256, 64);
  _tile_stored(2, out + 512, 64);
  _tile_stored(3, out + 768, 64);
}

// The result's height and width as it is computed, and how many blocks it is cut into: enough for all threads.
struct Blocks {
  bool swap;  // x is the left map
  int height, width, rows, columns, down, across;

  explicit Blocks(const Call& call) : swap(call.inputs < call.outputs) {
    height = swap ? call.inputs : call.outputs, width = swap ? call.outputs : call.inputs;
    cut(over(height, LEFT), over(width, RIGHT));
    while (!fills(call) && columns > STRIP) cut(down, across + 1);
    while (!fills(call) && rows > STRIP) cut(down + 1, across);
  }
  void cut(int parts_down, int parts_across) {
    rows = up_to(over(height, parts_down), SQUARE), columns = up_to(over(width, parts_across), SQUARE);
    down = parts_down, across = parts_across;
  }
  bool fills(const Call& call) const {
    const int64_t count = call.chunks * down * across;
    return count % call.threads == 0 || count >= 4 * call.threads;
  }
  float* sums(const Call& call, int64_t chunk, int row, int column) const {
    return call.weight_parts + chunk * height * width + (column / SQUARE * (height / SQUARE) + row / SQUARE) * int64_t(SUMS);
  }
};

// Adds a square's sums over all chunks, which lie `apart`, and writes them where they belong in the gradient.
void finish(const Call& call, const Blocks& blocks, int row, int column, const float* sums, int64_t apart) {
  __m512i tiles[4][16];
  for (int i = 0; i < 64; ++i) {
    Vec<float> total{};
    for (int64_t chunk = 0; chunk < call.chunks; ++chunk) total += load(sums + chunk * apart + 16 * i);
    tiles[i / 16][i % 16] = (__m512i)total;
  }
  if (blocks.swap)
    for (auto& tile : tiles) transpose(tile);
  const int output = blocks.swap ? column : row, input = blocks.swap ? row : column;
  const int beside = blocks.swap ? 2 : 1, below = 3 - beside;  // from a tile to its neighbours
  BFloat16* out = static_cast<BFloat16*>(call.weight_grad) + output * int64_t(call.inputs) + input;
  for (int i = 0; i < SQUARE; ++i, out += call.inputs)
    for (int j = 0; j < 2; ++j) store_narrow(out + 16 * j, (Vec<float>)tiles[i / 16 * below + j * beside][i % 16]);
}

int64_t tasks(const Call& call) {
  const Blocks blocks(call);
  return call.chunks * blocks.down * blocks.across;
}

void task(const Call& call, int64_t number) {
  static thread_local Room* const room = new Room;
  const Blocks blocks(call);
  const bool swap = blocks.swap;
  const int height = blocks.height, width = blocks.width;
  const int64_t chunk = number / (blocks.across * blocks.down);
  const int row = int(number / blocks.across % blocks.down) * blocks.rows;
  const int column = int(number % blocks.across) * blocks.columns;
  const int rows = least(blocks.rows, height - row), columns = least(blocks.columns, width - column);
  if (rows <= 0 || columns <= 0) return;  // the blocks before have all of it
  const BFloat16* left = static_cast<const BFloat16*>(swap ? call.x : call.grad) + row;
  const BFloat16* right = static_cast<const BFloat16*>(swap ? call.grad : call.x) + column;
  // The sums of grad's rows: only of one of the tasks that have these.
  float* left_sums = !swap && column == 0 ? room->left_sums : nullptr;
  float* right_sums = swap && row == 0 ? room->right_sums : nullptr;
  if (left_sums) memset(left_sums, 0, sizeof room->left_sums);
  if (right_sums) memset(right_sums, 0, sizeof room->right_sums);

  const auto sums_at = [&](int i, int j) {  // the only chunk's stay with the thread, in the cache
    return call.chunks == 1 ? room->sums + (j / SQUARE * (rows / SQUARE) + i / SQUARE) * int64_t(SUMS)
                            : blocks.sums(call, chunk, row + i, column + j);
  };
  const Tiles held;
  const int64_t begin = call.tokens * chunk / call.chunks, end = call.tokens * (chunk + 1) / call.chunks;
  for (int64_t token = begin; token < end; token += TOKENS) {
    const auto until = [&](int64_t from) { return end - from < TOKENS ? int(end - from) : TOKENS; };
    const int tokens = until(token), steps = over(tokens, DEPTH);
    const int64_t next = token + tokens;
    lay_out_left(left + token * height, height, rows, tokens, steps, room->left, left_sums);
    for (int strip = 0; strip < columns; strip += STRIP) {
      const int wide = least(STRIP, columns - strip), done = strip + wide, more = until(next);
      const BFloat16* here = right + token * width + strip;
      lay_out_right(here, width, wide, tokens, steps, room->right, right_sums ? right_sums + strip : nullptr);
      // What comes: a part of the left map's next tokens, and the right map's next strip.
      const int all = wide / SQUARE * (rows / SQUARE) * steps, first = more * strip / columns, last = more * done / columns;
      Ahead of_left(left + (next + first) * height, height, rows, last - first, all);
      Ahead of_right = done < columns ? Ahead(here + STRIP, width, least(STRIP, columns - done), tokens, all)
                                      : Ahead(right + next * width, width, least(STRIP, columns), more, all);
      for (int j = 0; j < wide; j += SQUARE)
        for (int i = 0; i < rows; i += SQUARE)
          multiply(room->left + i / 16 * steps * TILE, room->right + j / 16 * (steps * TILE + GAP), steps,
                   sums_at(i, strip + j), token > begin, of_left, of_right);
    }
  }
  if (call.chunks == 1)  // while they are near
    for (int j = 0; j < columns; j += SQUARE)
      for (int i = 0; i < rows; i += SQUARE) finish(call, blocks, row + i, column + j, sums_at(i, j), 0);

  float* bias = call.bias_parts + chunk * call.outputs;
  if (left_sums)
    for (int i = 0; i < rows; ++i) bias[row + i] = sum<float>(load(left_sums + 16 * i));
  if (right_sums) memcpy(bias + column, right_sums, columns * sizeof(float));
}

void add_parts(const Call& call, int64_t square) {
  const Blocks blocks(call);
  const int down = blocks.height / SQUARE;
  const int row = int(square % down) * SQUARE, column = int(square / down) * SQUARE;
  finish(call, blocks, row, column, blocks.sums(call, 0, row, column), int64_t(blocks.height) * blocks.width);
}

}  // namespace

extern const Kernel INSTRUCTION_SET = {tasks, task, add_parts};
#else
extern const Kernel INSTRUCTION_SET = {};
#endif

}  // namespace swinv2_weight_gradient
