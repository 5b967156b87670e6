// The products of a linear layer, x · weightᵀ + bias and grad · weight, in bfloat16 by AMX tiles.
//
// What decides is how tiles come from a core's second cache: the first holds a square of the result's operands and no more.
// The weight is laid out first, as panels of 32 columns. A task multiplies a chunk of rows, 32 at a time, with as many
// panels as stay in the second cache. While a square of 32 × 32 is summed in four tiles, the tiles of the next step are
// asked for, the square before it is rounded and written, the lines that this one goes to are asked for, and some of the
// next 32 rows are copied into tiles.
//
// Each number is summed in one order, whatever the threads. There is nothing here for processors without AMX.

#include "linear_cpu.h"

#include <stdlib.h>

#include "tiles.h"

namespace swinv2_linear {

#if defined(__AMX_BF16__)
namespace {

using namespace tiles;
using namespace vectors;

constexpr int SQUARE = 32;
constexpr int CACHE = 1 << 20;  // bytes of panels: half of the second cache
constexpr int NEAR = 512;       // inputs; of more, the first cache does not keep the tiles of x from one panel to the next

// A panel: for each step of 32 inputs, the tiles of 16 columns and of 16 more.
int64_t panel_words(const Call& call) { return int64_t(call.inputs) * SQUARE; }

INLINE BFloat16* panel_of(const Call& call, int64_t panel) {
  return static_cast<BFloat16*>(call.panels) + panel * panel_words(call);
}

// 32 rows of the weight as it lies in memory: a panel, or a step of all panels.
void lay_out(const Call& call, int64_t band) {
  const BFloat16* from = static_cast<const BFloat16*>(call.weight);
  if (call.transposed) {
    BFloat16* to = panel_of(call, band);
    from += band * SQUARE * call.inputs;
    for (int input = 0; input < call.inputs; input += DEPTH)
      for (int half = 0; half < 2; ++half, to += TILE) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + (16 * half + i) * int64_t(call.inputs) + input);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * DEPTH, rows[i]);
      }
  } else {
    from += band * DEPTH * call.outputs;
    for (int panel = 0; panel < call.outputs / SQUARE; ++panel, from += SQUARE) {
      BFloat16* to = panel_of(call, panel) + band * 2 * TILE;
      for (int i = 0; i < 16; ++i, to += DEPTH) {
        const BFloat16 *a = from + 2 * i * int64_t(call.outputs), *b = a + call.outputs;
        _mm_prefetch(a + 4 * SQUARE, _MM_HINT_T1), _mm_prefetch(b + 4 * SQUARE, _MM_HINT_T1);
        const Pairs p = pairs(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
        _mm512_store_si512(to, p.first), _mm512_store_si512(to + TILE, p.last);
      }
    }
  }
}

// A square whose sums are there: some rows of 32 columns.
struct Square {
  const float* sums;     // four tiles
  const BFloat16* bias;  // (32) or null
  BFloat16* out;
  int rows;
};

INLINE void finish_row(const Square& square, int64_t stride, int row) {
  const float* sums = square.sums + row / 16 * 512 + row % 16 * 16;
  Vec<float> a = load(sums), b = load(sums + 256);
  if (square.bias) a += load_wide(square.bias), b += load_wide(square.bias + 16);
  _mm512_storeu_si512(square.out + row * stride, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

// 32 rows of x, of which some may not exist, on their way into tiles: for each step the first 16 rows, then the last.
struct Strip {
  const BFloat16* x;
  BFloat16* tiles;
  int inputs, rows, left, row;  // left: lines that are not copied yet

  Strip(const BFloat16* x, BFloat16* tiles, int inputs, int rows)
      : x(x), tiles(tiles), inputs(inputs), rows(rows), left(rows > 0 ? inputs : 0), row(0) {}

  INLINE void copy(int lines) {
    for (; lines > 0 && left > 0; --lines, --left, tiles += DEPTH) {
      const BFloat16* from = x + row * int64_t(inputs);
      _mm_prefetch(from + 2 * DEPTH, _MM_HINT_T0);
      _mm512_store_si512(tiles, row < rows ? _mm512_loadu_si512(from) : _mm512_setzero_si512());
      if (++row == SQUARE) row = 0, x += DEPTH;
    }
  }
};

// Sums of a square, while another is finished, and part of a strip copied. The steps of one panel go up and those of the
// next down, so that the tiles of x that were read last, which the first cache still holds, come first; a panel's tiles,
// which are read once, pass that cache by. `ahead` is where the next panel begins.
INLINE void multiply(const Call& call, const BFloat16* x, const BFloat16* panel, const BFloat16* ahead, bool down,
                     float* sums, const Square& next, Square& done, Strip& coming, int lines) {
  const int steps = call.inputs / DEPTH, each = over(SQUARE, steps), forth = down ? -2 * TILE : 2 * TILE;
  const bool far = call.inputs > NEAR;
  if (down) x += (steps - 1) * 2 * TILE, panel += (steps - 1) * 2 * TILE;
  int row = 0;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step, x += forth, panel += forth) {
    _tile_loadd(4, x, 64);
    _tile_stream_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    const BFloat16* after = step + 1 < steps ? panel + forth : ahead;
    ask_for(after, 16);
    _tile_stream_loadd(7, panel + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (far) ask_for(after + TILE, 16);
    _tile_loadd(5, x + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (far) ask_for(x + forth, 32);
    coming.copy(lines);
    for (int i = 0; i < each && row < SQUARE; ++i, ++row) {
      if (row < done.rows) finish_row(done, call.outputs, row);
      if (row < next.rows) _m_prefetchw(next.out + row * int64_t(call.outputs));
    }
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  done = next;
}

// Panels are shared out in blocks that fit into the cache.
struct Blocks {
  int panels, each, count;

  explicit Blocks(const Call& call) : panels(call.outputs / SQUARE) {
    const int fit = most(1, int(CACHE / (panel_words(call) * sizeof(BFloat16))));
    each = over(panels, over(panels, fit)), count = over(panels, each);
  }
};

int64_t tasks(const Call& call) { return Blocks(call).count * call.chunks; }

BFloat16* room_for(int inputs) {  // two strips, of a thread, for as long as it lives
  static thread_local BFloat16* room = nullptr;
  static thread_local int held = 0;
  if (held < inputs) {
    free(room);
    room = static_cast<BFloat16*>(aligned_alloc(64, 2 * SQUARE * inputs * sizeof(BFloat16))), held = inputs;
  }
  return room;
}

void task(const Call& call, int64_t number) {
  const Blocks blocks(call);
  const int first = int(number / call.chunks) * blocks.each, last = least(blocks.panels, first + blocks.each);
  const int64_t chunk = number % call.chunks, strips = (call.rows + SQUARE - 1) / SQUARE;
  const int64_t begin = strips * chunk / call.chunks, end = strips * (chunk + 1) / call.chunks;
  BFloat16* const room = room_for(call.inputs);
  const auto tiles_of = [&](int64_t strip) { return room + strip % 2 * SQUARE * call.inputs; };
  const auto rows_of = [&](int64_t strip) {
    return strip == end ? 0 : call.rows - strip * SQUARE < SQUARE ? int(call.rows - strip * SQUARE) : SQUARE;
  };
  const auto strip_at = [&](int64_t strip) {
    const BFloat16* x = static_cast<const BFloat16*>(call.x) + strip * SQUARE * call.inputs;
    return Strip(x, tiles_of(strip), call.inputs, rows_of(strip));
  };
  alignas(64) float sums[2][SQUARE * SQUARE];
  Square done{};
  bool odd = false;
  const Tiles held;
  strip_at(begin).copy(call.inputs);
  for (int64_t strip = begin; strip < end; ++strip) {
    Strip coming = strip_at(strip + 1);
    for (int panel = first; panel < last; ++panel, odd = !odd) {
      const int column = panel * SQUARE;
      const Square next{sums[odd], call.bias ? static_cast<const BFloat16*>(call.bias) + column : nullptr,
                        static_cast<BFloat16*>(call.out) + strip * SQUARE * call.outputs + column, rows_of(strip)};
      const BFloat16 *here = panel_of(call, panel), *following = panel_of(call, panel + 1 < last ? panel + 1 : first);
      const BFloat16* ahead = odd ? following : following + panel_words(call) - 2 * TILE;
      multiply(call, tiles_of(strip), here, ahead, odd, sums[odd], next, done, coming, over(SQUARE, last - first));
    }
  }
  for (int row = 0; row < done.rows; ++row) finish_row(done, call.outputs, row);
}

}  // namespace

extern const Kernel INSTRUCTION_SET = {lay_out, tasks, task};
#else
extern const Kernel INSTRUCTION_SET = {};
#endif

}  // namespace swinv2_linear
