// AMX tiles: 16 rows of 64 bytes. Included by files that are compiled once per instruction set; internal linkage, as
// vectors.h has it and for its reason.
//
// A product of tiles wants its left matrix as 16 rows of 32 bfloat16 along the contracted dimension, and its right one as 16
// rows, each of 16 columns' pairs of neighbours along that dimension.

#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__)
namespace {
namespace tiles {

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

// Two rows of 32 words -> the pairs of their first 16 columns, and of their last 16.
struct Pairs {
  __m512i first, last;
};
INLINE Pairs pairs(__m512i a, __m512i b) {
  const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
  return {_mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high),
          _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high)};
}

// Lines of 64 bytes that will be read soon, from the second cache or beyond.
template <class T>
INLINE void ask_for(const T* from, int lines) {
  for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(from) + 64 * i, _MM_HINT_T0);
}

}  // namespace tiles
}  // namespace
#endif
