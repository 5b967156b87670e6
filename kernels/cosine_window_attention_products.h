// The matrix products and transpositions that cosine_window_attention_cpu.cpp is made of, and the words that they read;
// that file says what words are.

#pragma once

#include "tiles.h"
#include "vectors.h"

namespace cosine_window_attention {
namespace {

using namespace vectors;

// -- words ---------------------------------------------------------------------------------------------------------------

template <class T, bool PAIR>
struct Words {
  static constexpr int SIZE = 1;
  static INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) { return a * b + c; }
  // Consecutive elements of a row.
  static INLINE void store_row(T* p, Vec<T> x) { store(p, x); }
};
#if defined(__AVX512BF16__)
template <>
struct Words<float, true> {
  static constexpr int SIZE = 2;
  static INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static INLINE void store_row(float* p, Vec<float> x) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
  // Lane by lane, the word of two rows.
  static INLINE Vec<float> join(Vec<float> low, Vec<float> high) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Vec<float>)_mm512_permutexvar_epi16(order, both);
  }
};
#endif

// -- matrix product --------------------------------------------------------------------------------------------------------

#if defined(__AMX_BF16__)
// Registers 0 to 3 hold c, 4 and 5 a, 6 and 7 b.
template <int ROWS, int COLUMNS, bool ADD>
INLINE void tile_block(const float* a, int64_t a_row, const float* b, int64_t b_row, int steps, float* c, int64_t c_row) {
  const int64_t a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
  if (ADD) {
    _tile_loadd(0, c, c_bytes);
    if (COLUMNS > 1) _tile_loadd(1, c + 16, c_bytes);
    if (ROWS > 1) _tile_loadd(2, c + 16 * c_row, c_bytes);
    if (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (COLUMNS > 1) _tile_zero(1);
    if (ROWS > 1) _tile_zero(2);
    if (ROWS > 1 && COLUMNS > 1) _tile_zero(3);
  }
  for (int k = 0; k < steps; k += 16) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (COLUMNS > 1) {
      _tile_loadd(7, b + k * b_row + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (ROWS > 1) {
      _tile_loadd(5, a + 16 * a_row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (COLUMNS > 1) _tile_stored(1, c + 16, c_bytes);
  if (ROWS > 1) _tile_stored(2, c + 16 * c_row, c_bytes);
  if (ROWS > 1 && COLUMNS > 1) _tile_stored(3, c + 16 * c_row + 16, c_bytes);
}

// All dimensions are completed to 16: what is too much is read and written, but has no effect on the rest.
template <bool ADD>
void tile_product(int rows, int columns, const float* a, int64_t a_row, const float* b, int64_t b_row, int steps, float* c,
                  int64_t c_row) {
  for (int j = 0; j < columns; j += 32)
    for (int i = 0; i < rows; i += 32) {
      const float *left = a + i * a_row, *right = b + j;
      float* to = c + i * c_row + j;
      const bool wide = columns - j > 16;
      if (rows - i > 16) {
        if (wide) tile_block<2, 2, ADD>(left, a_row, right, b_row, steps, to, c_row);
        else tile_block<2, 1, ADD>(left, a_row, right, b_row, steps, to, c_row);
      } else {
        if (wide) tile_block<1, 2, ADD>(left, a_row, right, b_row, steps, to, c_row);
        else tile_block<1, 1, ADD>(left, a_row, right, b_row, steps, to, c_row);
      }
    }
}
#endif

// c (ROWS, COLUMNS vectors) = [c +] a · b, in registers.
template <class T, bool PAIR, int ROWS, int COLUMNS, bool ADD>
__attribute__((noinline)) void block(const T* a, int64_t a_row, const T* b, int64_t b_row, int steps, T* c, int64_t c_row) {
  Vec<T> total[ROWS][COLUMNS] = {};
  for (int k = 0; k < steps; ++k, b += b_row) {
    Vec<T> right[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) right[j] = load(b + j * LANES<T>);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> left = splat(a[r * a_row + k]);
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) total[r][j] = Words<T, PAIR>::multiply_add(left, right[j], total[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      T* to = c + r * c_row + j * LANES<T>;
      store(to, ADD ? load(to) + total[r][j] : total[r][j]);
    }
}

template <class T, bool PAIR, int ROWS, int COLUMNS, bool ADD>
INLINE void block_rows(int rows, const T* a, int64_t a_row, const T* b, int64_t b_row, int steps, T* c, int64_t c_row) {
  for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row)
    block<T, PAIR, ROWS, COLUMNS, ADD>(a, a_row, b, b_row, steps, c, c_row);
  if constexpr (ROWS > 1) {
    constexpr int fewer = ROWS > 8 ? 8 : ROWS > 4 ? 4 : ROWS / 2;
    if (rows) block_rows<T, PAIR, fewer, COLUMNS, ADD>(rows, a, a_row, b, b_row, steps, c, c_row);
  }
}

// c (rows, columns) = [c +] a · b; columns are a multiple of the vector.
template <bool PAIR, bool ADD, class T>
void product(int rows, int columns, const T* a, int64_t a_row, const T* b, int64_t b_row, int steps, T* c, int64_t c_row) {
  constexpr int lanes = LANES<T>;
  constexpr bool many = REGISTERS == 32;
#if defined(__AMX_BF16__)
  if constexpr (PAIR) return tile_product<ADD>(rows, columns, a, a_row, b, b_row, steps, c, c_row);
#endif
  int j = 0;
  if constexpr (many)
    for (; j + 4 * lanes <= columns; j += 4 * lanes)
      block_rows<T, PAIR, 6, 4, ADD>(rows, a, a_row, b + j, b_row, steps, c + j, c_row);
  for (; j + 2 * lanes <= columns; j += 2 * lanes)
    block_rows<T, PAIR, many ? 12 : 6, 2, ADD>(rows, a, a_row, b + j, b_row, steps, c + j, c_row);
  for (; j < columns; j += lanes)
    block_rows<T, PAIR, many ? 12 : 8, 1, ADD>(rows, a, a_row, b + j, b_row, steps, c + j, c_row);
}

// (LANES, LANES) words: log2 steps, each exchanging halves of blocks.
template <class T, int STEP = LANES<T> / 2>
INLINE void transpose_square(Vec<T>* x) {
  Bits<T> low, high;
  for (int i = 0; i < LANES<T>; ++i) {
    low[i] = i & STEP ? i - STEP + LANES<T> : i;
    high[i] = i & STEP ? i + LANES<T> : i + STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES<T>; ++i)
    if (!(i & STEP)) {
      const Vec<T> a = x[i], b = x[i + STEP];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + STEP] = __builtin_shuffle(a, b, high);
    }
  if constexpr (STEP > 1) transpose_square<T, STEP / 2>(x);
}
// to (columns, rows) from (rows, columns); both are multiples of the vector.
template <class T>
void transpose(int rows, int columns, const T* from, T* to) {
  constexpr int lanes = LANES<T>;
  for (int r = 0; r < rows; r += lanes)
    for (int c = 0; c < columns; c += lanes) {
      Vec<T> x[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) x[i] = load(from + (r + i) * int64_t(columns) + c);
      transpose_square<T>(x);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(to + (c + i) * int64_t(rows) + r, x[i]);
    }
}

}  // namespace
}  // namespace cosine_window_attention
