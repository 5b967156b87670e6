// Vectors of one instruction set, and the types that maps are stored in. Included by files that are compiled once per
// instruction set: all of it has internal linkage, and nothing of the standard library's templates is used, so that no
// code for a newer processor can replace that of an older one when the objects are linked.

#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef INSTRUCTION_SET
#define INSTRUCTION_SET portable
#endif
#define INLINE __attribute__((always_inline)) inline

namespace {
namespace vectors {

// -- vectors -------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int BYTES = 32, REGISTERS = 16;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(BYTES)));
  typedef int32_t bits __attribute__((vector_size(BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(BYTES)));
  typedef int64_t bits __attribute__((vector_size(BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Bits = typename VectorOf<T>::bits;
template <class T>
constexpr int LANES = BYTES / sizeof(T);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float INF = __builtin_inff();
constexpr float LEAST = -3e38f;
constexpr float BOUNDED_RANGE = 100;  // 2^-100 is far from the smallest number, products with it too
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int most(int a, int b) { return a < b ? b : a; }
INLINE int over(int count, int part) { return (count + part - 1) / part; }  // rounded up
INLINE int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class To, class From>
INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
template <class T>
INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // of which nothing is left but the copies; 0 + x would be added, for -0
}
template <class T>
INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
INLINE void store(T* p, Vec<T> x) {
  memcpy(p, &x, sizeof x);
}
// Adds `count` elements.
template <class T>
INLINE void add(T* to, const T* from, int count) {
  int i = 0;
  for (; i + LANES<T> <= count; i += LANES<T>) store(to + i, load(to + i) + load(from + i));
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 rest = __mmask16((1u << (count - i)) - 1);
    const __m512 total = _mm512_add_ps(_mm512_maskz_loadu_ps(rest, to + i), _mm512_maskz_loadu_ps(rest, from + i));
    _mm512_mask_storeu_ps(to + i, rest, total);
    return;
  }
#endif
  for (; i < count; ++i) to[i] += from[i];
}
template <class T>
INLINE T sum(Vec<T> x) {
  T total[LANES<T>];
  memcpy(total, &x, sizeof x);
  for (int n = LANES<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) total[i] += total[i + n];
  return total[0];
}
template <class T>
INLINE T largest(Vec<T> x) {
  T top[LANES<T>];
  memcpy(top, &x, sizeof x);
  for (int n = LANES<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) top[i] = top[i] > top[i + n] ? top[i] : top[i + n];
  return top[0];
}
#if defined(__AVX512F__)
template <>
INLINE float sum<float>(Vec<float> x) {
  return _mm512_reduce_add_ps((__m512)x);
}
template <>
INLINE float largest<float>(Vec<float> x) {
  return _mm512_reduce_max_ps((__m512)x);
}
#endif

// 2^x; NaN from NaN; 0 below the smallest normal number, because others are slow.
INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> whole = (Vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> part = x - whole;
#else
  const Vec<float> shifted = x + 12582912.0f;  // 1.5 · 2^23: the integer nearest to x in the low bits
  const Vec<float> part = x - (shifted - 12582912.0f);
#endif
  // Minimax on [-1/2, 1/2], relative error 7.5e-8.
  Vec<float> y = splat(0.0013276471992533978f);
  y = y * part + 0.009675541334453752f;
  y = y * part + 0.055507132734978495f;
  y = y * part + 0.24022119723839974f;
  y = y * part + 0.6931469670647609f;
  y = y * part + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)whole);
#else
  const Vec<float> scaled = bit_cast<Vec<float>>(bit_cast<Bits<float>>(y) + (bit_cast<Bits<float>>(shifted) << 23));
  return x < -126.0f ? splat(0.0f) : scaled;
#endif
}
// The same to a relative error of 7.5e-5, which is enough for bfloat16; x is at least -126.
INLINE Vec<float> rough_exp2(Vec<float> x) {
  const Vec<float> shifted = x + 12582912.0f, part = x - (shifted - 12582912.0f);
  const Vec<float> y = (0.05517170950770378f * part + 0.24261121451854706f) * part + 0.6932609677314758f;
  const Vec<float> power = y * part + 0.9999280571937561f;
  return bit_cast<Vec<float>>(bit_cast<Bits<float>>(power) + (bit_cast<Bits<float>>(shifted) << 23));
}
INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
INLINE float log2_of(float x) { return __builtin_log2f(x); }
INLINE double log2_of(double x) { return __builtin_log2(x); }
INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

// -- storage types -------------------------------------------------------------------------------------------------------

INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
INLINE float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  const float size = rest < 0x7c00 ? bit_cast<float>(rest << 13) * 0x1p112f : bit_cast<float>(rest << 13 | 0x7f800000);
  return bit_cast<float>(sign | bit_cast<uint32_t>(size));
}
INLINE void narrow(float x, BFloat16* y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  y->bits = uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void narrow(float x, Float16* y) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x477ff000) {  // rounds to 2^16 or more, infinite, or NaN
    y->bits = uint16_t(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
  } else if (size < 0x38800000) {  // below 2^-14: a multiple of 2^-24, rounded by an addition
    y->bits = uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000));
  } else {
    y->bits = uint16_t(sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13));
  }
}

template <class Element>
INLINE Vec<float> load_wide(const Element* p) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_loadu_si256((const __m256i*)p);
  if (__is_same(Element, Float16)) return (Vec<float>)_mm512_cvtph_ps(x);
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#elif defined(__AVX2__)
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  if (__is_same(Element, Float16)) return (Vec<float>)_mm256_cvtph_ps(x);
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
#else
  Vec<float> x;
  for (int i = 0; i < LANES<float>; ++i) x[i] = widen(p[i]);
  return x;
#endif
}
INLINE Vec<float> load_wide(const float* p) { return load(p); }
INLINE Vec<double> load_wide(const double* p) { return load(p); }

template <class Element>
INLINE void store_narrow(Element* p, Vec<float> x) {
#if defined(__AVX512F__)
  if (__is_same(Element, Float16)) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#elif defined(__AVX2__)
  if (__is_same(Element, Float16)) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
#if defined(__AVX512BF16__)
  if (__is_same(Element, BFloat16)) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    return;
  }
#endif
  for (int i = 0; i < LANES<float>; ++i) narrow(x[i], p + i);
}
INLINE void store_narrow(float* p, Vec<float> x) { store(p, x); }
INLINE void store_narrow(double* p, Vec<double> x) { store(p, x); }

// A vector of `count` elements, a multiple of 8 that may be less than the vector: zeros fill it.
template <class Element>
INLINE auto load_part(const Element* p, int count) {
  constexpr int lanes = sizeof(Element) == 8 ? LANES<double> : LANES<float>;
  Element padded[lanes] = {};
  if constexpr (lanes > 8)
    if (count < lanes) memcpy(padded, p, 8 * sizeof(Element)), p = padded;
  return load_wide(p);
}
template <class Element, class V>
INLINE void store_part(Element* p, V x, int count) {
  constexpr int lanes = sizeof(Element) == 8 ? LANES<double> : LANES<float>;
  if constexpr (lanes > 8)
    if (count < lanes) {
      Element padded[lanes];
      store_narrow(padded, x);
      memcpy(p, padded, 8 * sizeof(Element));
      return;
    }
  store_narrow(p, x);
}

}  // namespace vectors
}  // namespace
