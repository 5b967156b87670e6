// The launchers of a block's CUDA kernels: plain functions on device pointers, for the binding and for the emulation.

#pragma once

#include <algorithm>
#include <stdexcept>

#include "block.h"
#include "gpu.h"

namespace swinv2_block::cuda {

namespace gpu = cosine_window_attention::gpu;

enum class Type { float32, bfloat16, float16 };
constexpr int64_t MAX_NORM_ROWS = int64_t(1) << 30;
constexpr int MAX_NORM_CHANNELS = 4096;  // of a norm; maps for GELU and sums may have any multiple of 16

// All tensors contiguous and on the current device, all but `keep` and statistics aligned to 16 bytes. Raise
// std::runtime_error. `total` is the sum of the call's partials over chunks, whose number the functions below give.
struct Launchers {
  void (*norm_forward)(const NormCall&, gpu::Stream);
  void (*norm_backward)(const NormCall&, float* total, gpu::Stream);
  void (*add_images)(const NormCall&, gpu::Stream);
  void (*gelu_forward)(const MapCall&, gpu::Stream);
  void (*gelu_backward)(const MapCall&, float* total, gpu::Stream);
  void (*sum_rows)(const MapCall&, float* total, gpu::Stream);
};

// Each type is a translation unit of its own, so that they compile side by side.
template <typename T>
Launchers launchers_of_type();
extern template Launchers launchers_of_type<gpu::float32>();
extern template Launchers launchers_of_type<gpu::bfloat16>();
extern template Launchers launchers_of_type<gpu::float16>();

inline Launchers launchers_for(Type type) {
  if (type == Type::float32) return launchers_of_type<gpu::float32>();
  if (type == Type::float16) return launchers_of_type<gpu::float16>();
  if (!gpu::has_bfloat16()) throw std::runtime_error("bfloat16 needs compute capability 8.0, take float16 or float32");
  return launchers_of_type<gpu::bfloat16>();
}

// Thread blocks that add up rows, of several waves on the largest GPU; each writes a number per column, which is to be little
// beside the rows that it reads. Never a function of the GPU, so that sums are added in one order.
inline int64_t norm_chunks(int64_t rows) { return std::clamp<int64_t>(rows / 32, 1, 1024); }
inline int64_t map_chunks(int64_t rows, int channels) {
  return std::clamp<int64_t>(rows / 64, 1, std::max(1, (1 << 18) / channels));
}

}  // namespace swinv2_block::cuda
