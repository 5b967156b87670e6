// The launchers of the CUDA kernels: plain functions on device pointers, for the binding and for the emulation.

#pragma once

#include <cstdint>

#include "cosine_window_attention.h"
#include "gpu.h"

namespace cosine_window_attention::cuda {

enum class Type { float32, bfloat16, float16 };

// All tensors contiguous and on the current device; qkv, out and their gradients have `type`, the rest is float32.
// Pointers to qkv, out and grad_out are aligned to 16 bytes. Raises std::runtime_error.
void forward(const Problem& problem, Type type, const void* qkv, const float* logit_scale, const float* bias_table, void* out,
             float* lse, gpu::Stream stream);

// Elements of float32 that backward needs to work in: of the order of the map's tokens, whatever the window.
int64_t backward_scratch(const Problem& problem);

void backward(const Problem& problem, Type type, const void* grad_out, const void* qkv, const float* logit_scale,
              const float* bias_table, const void* out, const float* lse, void* grad_qkv, float* grad_logit_scale,
              float* grad_bias_table, float* scratch, gpu::Stream stream);

}  // namespace cosine_window_attention::cuda
