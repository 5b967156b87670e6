// The tail of the normal distribution, which GELU needs, for vectors of a CPU and for numbers of a GPU. Internal linkage, as
// vectors.h has it and for its reason.

#pragma once

#if defined(__CUDACC__)
#define NORMAL_TAIL_INLINE __device__ __forceinline__
#else
#define NORMAL_TAIL_INLINE __attribute__((always_inline)) inline
#endif

namespace {
namespace normal_tail {

constexpr float SLOPE = 0.26516504294495535f;  // 0.375 / √2

// erfc(t) · exp(t²) = u · polynomial(u) with u = 1 / (1 + 0.375 t), t = |x| / √2: relative error 1.1e-8, fitted for t in
// 0 … 9.5.
template <class V>
NORMAL_TAIL_INLINE V polynomial(V u) {
  V y = 0.06169677283285434f * u - 0.2880761497730585f;
  y = y * u + 0.43389536800719564f;
  y = y * u - 0.23107823460052224f;
  y = y * u + 0.2748453627308676f;
  y = y * u + 0.12103844086852371f;
  y = y * u + 0.2054305529144477f;
  y = y * u + 0.21063348204994864f;
  return y * u + 0.21161441628532499f;
}

}  // namespace normal_tail
}  // namespace
