// GELU, x · Φ(x) with the normal distribution Φ, and its slope, Φ(x) + x · density, on vectors of one instruction set.
//
// Arithmetic is what takes time. So for numbers that lie in memory in the 8 bits of bfloat16, GELU is max(x, 0) - |x| · tail
// with tail = Φ(-|x|), which is 2 to the power of a polynomial: with a relative error of 4e-4 for |x| below 3, and e times
// that for each 1 beyond, where GELU itself falls faster. The slope is tail times a polynomial where x is negative, and 1
// minus that where it is not. Two vectors are unpacked and packed together, the numbers at even places and those at odd ones.
// Internal linkage, as vectors.h has it and for its reason.

#pragma once

#include "normal_tail.h"
#include "vectors.h"

namespace {
namespace gelu {

using namespace vectors;

template <class T>
struct Gelu {
  Vec<T> value, slope;
};

constexpr float FAR = 10;  // what is beyond is taken for it, which also keeps infinity from being multiplied with nothing

INLINE Vec<float> magnitude(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)splat(FAR), _mm512_abs_ps((__m512)x));  // NaN stays
#else
  const Vec<float> size = x < 0.0f ? -x : x;
  return size > FAR ? splat(FAR) : size;
#endif
}
INLINE Vec<float> positive(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)splat(0.0f), (__m512)x);
#else
  return x < 0.0f ? splat(0.0f) : x;
#endif
}

// Of numbers that lie in memory as Elements.
template <class Element>
INLINE Gelu<float> gelu(Vec<float> x) {
  if (__is_same(Element, BFloat16)) {
    const Vec<float> size = magnitude(x);
    Vec<float> power = -0.00017898941587191075f * size + 0.004248189739882946f;
    power = (power * size - 0.04217534512281418f) * size - 0.4734727144241333f;
    const Vec<float> tail = rough_exp2((power * size - 1.1442105770111084f) * size - 1.000534176826477f);
    Vec<float> ratio = -0.0008708985988050699f * size + 0.014223994687199593f;  // of the slope to tail
    ratio = (ratio * size - 0.09492333978414536f) * size - 0.649634838104248f;
    const Vec<float> slope = tail * ((ratio * size - 0.7938681244850159f) * size + 0.9998037815093994f);
    return {positive(x) - size * tail, x < 0.0f ? slope : 1.0f - slope};
  }
  const Vec<float> bell = exp2(x * x * -0.7213475204444817f);  // exp(-x²/2)
  const Vec<float> u = 1.0f / (1.0f + normal_tail::SLOPE * (x < 0.0f ? -x : x));
  const Vec<float> tail = 0.5f * u * normal_tail::polynomial(u) * bell, below = x < 0.0f ? tail : 1.0f - tail;
  return {x * below, below + x * (bell * 0.3989422804014327f)};
}
template <class Element>
INLINE Gelu<double> gelu(Vec<double> x) {
  Gelu<double> found;
  for (int i = 0; i < LANES<double>; ++i) {
    const double below = 0.5 * __builtin_erfc(-x[i] * 0.7071067811865476);
    found.value[i] = x[i] * below;
    found.slope[i] = below + x[i] * 0.3989422804014327 * __builtin_exp(-0.5 * x[i] * x[i]);
  }
  return found;
}

#if defined(__AVX512F__)
// 32 numbers, those at even places and those at odd ones.
struct Both {
  Vec<float> even, odd;
};
INLINE Both load_both(const BFloat16* from) {
  const __m512i words = _mm512_loadu_si512(from);
  return {(Vec<float>)_mm512_slli_epi32(words, 16), (Vec<float>)_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000))};
}
INLINE void store_both(BFloat16* to, Vec<float> even, Vec<float> odd) {  // halves are rounded away from 0
  const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(0xffff0000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
  const __m512i merged = _mm512_ternarylogic_epi32(low, _mm512_add_epi32((__m512i)odd, half), high, 0xf8);  // low | b & c
  _mm512_storeu_si512(to, merged);
}
#endif

// Rows of `count` numbers, a multiple of 16.
template <class Element, class T>
INLINE void forward(const Element* hidden, Element* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (__is_same(Element, BFloat16))
    for (; i + 32 <= count; i += 32) {
      const Both x = load_both(hidden + i);
      store_both(out + i, gelu<Element>(x.even).value, gelu<Element>(x.odd).value);
    }
#endif
  for (; i < count; i += LANES<T>) store_narrow(out + i, gelu<Element>(load_wide(hidden + i)).value);
}

// The gradient of GELU's input in the place of that of its output, added to `sums`, whose order `settle` restores; and GELU
// again, which nobody kept.
template <class Element, class T>
INLINE void backward(const Element* hidden, Element* grad, Element* out, T* sums, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (__is_same(Element, BFloat16))
    for (; i + 32 <= count; i += 32) {
      const Both x = load_both(hidden + i), g = load_both(grad + i);
      const Gelu<float> even = gelu<Element>(x.even), odd = gelu<Element>(x.odd);
      const Vec<float> even_slope = g.even * even.slope, odd_slope = g.odd * odd.slope;
      store_both(out + i, even.value, odd.value);
      store_both(grad + i, even_slope, odd_slope);
      store(sums + i, load(sums + i) + even_slope), store(sums + i + 16, load(sums + i + 16) + odd_slope);
    }
#endif
  for (; i < count; i += LANES<T>) {
    const Gelu<T> at = gelu<Element>(load_wide(hidden + i));
    const Vec<T> slope = load_wide(grad + i) * at.slope;
    store_narrow(out + i, at.value);
    store_narrow(grad + i, slope);
    store(sums + i, load(sums + i) + slope);
  }
}
template <class Element, class T>
INLINE void settle(T* sums, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (__is_same(Element, BFloat16)) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t i = 0; i + 32 <= count; i += 32) {
      const __m512 even = _mm512_loadu_ps(sums + i), odd = _mm512_loadu_ps(sums + i + 16);
      _mm512_storeu_ps(sums + i, _mm512_permutex2var_ps(even, first, odd));
      _mm512_storeu_ps(sums + i + 16, _mm512_permutex2var_ps(even, last, odd));
    }
  }
#endif
}

}  // namespace gelu
}  // namespace
