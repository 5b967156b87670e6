// The launchers of the CUDA kernels: plain functions on device pointers, for the binding and for the emulation.

#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cosine_window_attention.h"
#include "gpu.h"

namespace cosine_window_attention::cuda {

enum class Type { float32, bfloat16, float16 };

// All tensors contiguous and on the current device; qkv, out and their gradients have the type that the launchers were asked
// for, the rest is float32. Pointers to qkv, out and grad_out are aligned to 16 bytes. Raise std::runtime_error.
struct Launchers {
  void (*forward)(const Problem& problem, const void* qkv, const float* logit_scale, const float* bias_table, void* out,
                  float* lse, gpu::Stream stream);
  void (*backward)(const Problem& problem, const void* grad_out, const void* qkv, const float* logit_scale,
                   const float* bias_table, const void* out, const float* lse, void* grad_qkv, float* grad_logit_scale,
                   float* grad_bias_table, float* scratch, gpu::Stream stream);
};

// For a head width that is valid. Each type is a translation unit of its own, so that they compile side by side.
template <typename T>
Launchers launchers_of_type(int width);
extern template Launchers launchers_of_type<gpu::float32>(int width);
extern template Launchers launchers_of_type<gpu::bfloat16>(int width);
extern template Launchers launchers_of_type<gpu::float16>(int width);

inline Launchers launchers_for(const Problem& p, Type type) {
  if (p.width < 8 || p.width > MAX_WIDTH || p.width % 8 != 0) {
    throw std::runtime_error("cosine_window_attention: head width must be 8 … 128 in steps of 8");
  }
  if (p.batch == 0 || p.map_tokens() == 0) throw std::runtime_error("cosine_window_attention: no tokens");
  if (type == Type::float32) return launchers_of_type<gpu::float32>(p.width);
  if (type == Type::float16) return launchers_of_type<gpu::float16>(p.width);
  if (!gpu::has_bfloat16()) {
    throw std::runtime_error("cosine_window_attention: bfloat16 needs compute capability 8.0, take float16 or float32");
  }
  return launchers_of_type<gpu::bfloat16>(p.width);
}

// Tiles of `tile_rows` rows in all windows of all images.
inline int64_t parts(const Problem& p, int tile_rows) {
  return p.batch * p.windows() * ((p.tokens() + tile_rows - 1) / tile_rows);
}

// Blocks per head in backward_queries, each with a table of its own: a few thousand blocks in all, if their tables take no
// more than 16 MB, or than two numbers per token and head.
inline int slots_for(const Problem& p, int64_t items) {
  const int64_t room = std::max<int64_t>(int64_t(1) << 22, 2 * p.batch * p.map_tokens() * p.heads);
  const int64_t slots = std::min<int64_t>(room / (int64_t(p.heads) * (p.offsets() + 1)), (2048 + p.heads - 1) / p.heads);
  return int(std::max<int64_t>(1, std::min(slots, items)));
}

// Elements of float32 that backward needs to work in: of the order of the map's tokens, whatever the window.
inline int64_t backward_scratch(const Problem& p) {
  const int slots = slots_for(p, parts(p, 1));  // no less than for larger tiles
  return p.batch * p.map_tokens() * p.heads + int64_t(slots) * p.heads * (p.offsets() + 1);
}

}  // namespace cosine_window_attention::cuda
