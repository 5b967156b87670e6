// The gradients of a linear layer's weight and bias, gradᵀ · x and the sum of grad's rows, in bfloat16 by AMX tiles.
//
// Tokens are what is summed over, and they are the rows of both maps. Tiles want them along the rows of the left matrix, and
// in pairs along the columns of the right one: 16 rows of 32 words, and 16 rows of 16 pairs. So a task, a block of the result
// over a chunk of the tokens, lays out some tokens of both maps as tiles at a time. Transposing takes longest: the left map
// is the one with fewer channels, and if that is x, it is the transposed result that is computed.
//
// What is summed in which order depends on the shapes alone: results are the same at any number of threads. There is nothing
// here for processors without AMX.

#include "weight_gradient_cpu.h"

#include "vectors.h"

namespace swinv2_weight_gradient {

#if defined(__AMX_BF16__)
namespace {

using namespace vectors;

constexpr int DEPTH = 32;               // tokens of a tile
constexpr int TILE = 16 * DEPTH;        // its words
constexpr int TOKENS = 512;             // that a task has in tiles at a time: with its channels less than a core's cache
constexpr int LEFT = 192, RIGHT = 512;  // channels of a task

struct Room {  // of a thread, for as long as it lives
  alignas(64) BFloat16 left[LEFT * TOKENS], right[RIGHT * TOKENS];
  alignas(64) float left_sums[16 * LEFT], right_sums[RIGHT];
};

int over(int count, int part) { return (count + part - 1) / part; }

// Two tokens of 32 channels, the second after the first, zeros for those that do not exist, as pairs of words. Of each 8
// channels the first four are in `low`. The next tile's tokens are on their way.
struct Pairs {
  __m512i low, high;
};
INLINE Pairs pairs(const BFloat16* token, int64_t stride, int64_t tokens) {
  _mm_prefetch(token + DEPTH * stride, _MM_HINT_T0);
  _mm_prefetch(token + (DEPTH + 1) * stride, _MM_HINT_T0);
  const __m512i a = tokens > 0 ? _mm512_loadu_si512(token) : _mm512_setzero_si512();
  const __m512i b = tokens > 1 ? _mm512_loadu_si512(token + stride) : _mm512_setzero_si512();
  return {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
}

// Adds to 16 sums those of 16 pairs.
INLINE void add_pairs(float* sums, __m512i words) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  _mm512_store_ps(sums, _mm512_dpbf16_ps(_mm512_load_ps(sums), (__m512bh)words, ones));
}

// 16 rows of 16 words of 32 bits -> their columns.
INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {  // r[4 j + i] has, in lane l, column 4 l + i of rows 4 j ... 4 j + 3
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88), t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88), r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88), r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
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
        const Pairs p = pairs(map + token * stride + channel, stride, tokens - token);
        halves[0][pair] = p.low, halves[1][pair] = p.high;
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

// The same as right tiles (channels / 16, steps, 16 pairs of tokens, 16 channels); `sums` (channels).
void lay_out_right(const BFloat16* map, int64_t stride, int channels, int64_t tokens, int steps, BFloat16* tiles, float* sums) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int pair = 0; pair < steps * 16; ++pair)
    for (int channel = 0; channel < channels; channel += 32) {
      const Pairs p = pairs(map + 2 * pair * stride + channel, stride, tokens - 2 * pair);
      const __m512i a = _mm512_permutex2var_epi64(p.low, first, p.high);
      const __m512i b = _mm512_permutex2var_epi64(p.low, second, p.high);
      BFloat16* to = tiles + channel / 16 * steps * TILE + pair * DEPTH;
      _mm512_store_si512(to, a), _mm512_store_si512(to + steps * TILE, b);
      if (sums) add_pairs(sums + channel, a), add_pairs(sums + channel + 16, b);
    }
}

// 32 × 32 of the result: left · right over all steps, added to what is there or in its place.
INLINE void multiply(const BFloat16* left, const BFloat16* right, int steps, float* out, int64_t stride, bool add) {
  const int64_t next = steps * TILE, bytes = stride * sizeof(float);
  float* below = out + 16 * stride;
  if (add) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + 16, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step, left += TILE, right += TILE) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + next, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + next, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + 16, bytes);
}

bool is_transposed(const Call& call) { return call.inputs < call.outputs; }  // x is the left map

int64_t tasks(const Call& call) {
  const bool swap = is_transposed(call);
  return call.chunks * over(swap ? call.inputs : call.outputs, LEFT) * over(swap ? call.outputs : call.inputs, RIGHT);
}

void task(const Call& call, int64_t number) {
  static thread_local Room* const room = new Room;
  const bool swap = is_transposed(call);
  const int height = swap ? call.inputs : call.outputs, width = swap ? call.outputs : call.inputs;
  const int down = over(height, LEFT), across = over(width, RIGHT);
  const int64_t chunk = number / (across * down);
  const int row = int(number / across % down) * LEFT, column = int(number % across) * RIGHT;
  const int rows = least(LEFT, height - row), columns = least(RIGHT, width - column);
  const BFloat16* left = static_cast<const BFloat16*>(swap ? call.x : call.grad) + row;
  const BFloat16* right = static_cast<const BFloat16*>(swap ? call.grad : call.x) + column;
  float* out = call.weight_parts + (chunk * height + row) * width + column;
  // The sums of grad's rows: only of one of the tasks that have these.
  float *left_sums = !swap && column == 0 ? room->left_sums : nullptr, *right_sums = swap && row == 0 ? room->right_sums : nullptr;
  if (left_sums) memset(left_sums, 0, sizeof room->left_sums);
  if (right_sums) memset(right_sums, 0, sizeof room->right_sums);

  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  _tile_loadconfig(&shape);
  const int64_t begin = call.tokens * chunk / call.chunks, end = call.tokens * (chunk + 1) / call.chunks;
  for (int64_t token = begin; token < end; token += TOKENS) {
    const int tokens = end - token < TOKENS ? int(end - token) : TOKENS, steps = over(tokens, DEPTH);
    lay_out_left(left + token * height, height, rows, tokens, steps, room->left, left_sums);
    lay_out_right(right + token * width, width, columns, tokens, steps, room->right, right_sums);
    for (int j = 0; j < columns; j += 32)
      for (int i = 0; i < rows; i += 32)
        multiply(room->left + i / 16 * steps * TILE, room->right + j / 16 * steps * TILE, steps, out + i * int64_t(width) + j,
                 width, token > begin);
  }
  _tile_release();

  float* bias = call.bias_parts + chunk * call.outputs;
  if (left_sums)
    for (int i = 0; i < rows; ++i) bias[row + i] = sum<float>(load(left_sums + 16 * i));
  if (right_sums) memcpy(bias + column, right_sums, columns * sizeof(float));
}

void add_parts(const Call& call, int64_t row) {
  BFloat16* out = static_cast<BFloat16*>(call.weight_grad) + row * call.inputs;
  const int64_t count = int64_t(call.outputs) * call.inputs;
  const bool swap = is_transposed(call);
  for (int column = 0; column < call.inputs; column += 16) {
    const float* from = call.weight_parts + (swap ? column * int64_t(call.outputs) + row : row * int64_t(call.inputs) + column);
    const int64_t stride = swap ? call.outputs : call.inputs;
    __m512i sums[16];
    for (int i = 0; i < 16; ++i) {
      Vec<float> total = load(from + i * stride);
      for (int64_t chunk = 1; chunk < call.chunks; ++chunk) total += load(from + chunk * count + i * stride);
      sums[i] = (__m512i)total;
    }
    if (swap) transpose(sums);
    for (int i = 0; i < 16; ++i) store_narrow(out + i * call.inputs + column, (Vec<float>)sums[i]);
  }
}

}  // namespace

extern const Kernel INSTRUCTION_SET = {tasks, task, add_parts};
#else
extern const Kernel INSTRUCTION_SET = {};
#endif

}  // namespace swinv2_weight_gradient
