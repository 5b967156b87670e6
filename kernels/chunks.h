// Numbers of a map on a GPU, 16 bytes at a time: float32 in registers, whatever the type in memory.

#pragma once

#include "gpu.h"

namespace cosine_window_attention::gpu {

// 16 bytes: 4 or 8 numbers.
template <typename T>
__device__ __forceinline__ void load_chunk(float* x, const T* at) {
  if constexpr (sizeof(T) == 4) {
    const float4 four = *reinterpret_cast<const float4*>(at);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(at);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<T>(word[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}
template <typename T>
__device__ __forceinline__ void store_chunk(T* at, const float* x) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(at) = float4{x[0], x[1], x[2], x[3]};
  } else {
    *reinterpret_cast<uint4*>(at) = uint4{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                                          pack<T>(x[6], x[7])};
  }
}

}  // namespace cosine_window_attention::gpu
