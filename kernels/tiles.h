// AMX tiles: 16 rows of 64 bytes. Included by files that are compiled once per instruction set; internal linkage, as
// vectors.h has it and for its reason.
//
// A product of tiles wants its left matrix as 16 rows of 32 bfloat16 along the contracted dimension, and its right one as 16
// rows, each of 16 columns' pairs of neighbours along that dimension.

#pragma once

#include "words.h"

#if defined(__AMX_BF16__)
namespace {
namespace tiles {

using namespace words;

constexpr int DEPTH = 32;        // of the contracted dimension
constexpr int TILE = 16 * DEPTH;  // words of 16 bits

struct Tiles {  // while one lives, its thread can use tiles
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// Lines of 64 bytes that will be read soon, from the second cache or beyond.
template <class T>
INLINE void ask_for(const T* from, int lines) {
  for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(from) + 64 * i, _MM_HINT_T0);
}

}  // namespace tiles
}  // namespace
#endif
