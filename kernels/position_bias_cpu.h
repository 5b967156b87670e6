// What bindings_position_bias.cpp knows of position_bias_cpu.cpp, which is compiled once per instruction set.

#pragma once

#include <stdint.h>

namespace swinv2_position_bias {

constexpr int MAX_AXES = 3, MAX_HEADS = 256;

// Row-major, float32. hidden is a multiple of 16.
struct Call {
  int64_t offsets;
  int axes, hidden, heads;
  const float* coordinates;         // (offsets, axes)
  const float *weight1, *bias1;     // (hidden, axes), (hidden)
  const float* weight2;             // (heads, hidden)
  float* out;                       // (heads, offsets)
  const float* grad;                // (heads, offsets), of out; the rest is backward's
  float* slopes;                    // (offsets, heads), the gradient of what the sigmoid takes
  float *weight1_grad, *bias1_grad, *weight2_grad;
};

// Forward and slopes work on `task` of as many as `offset_tasks` has, gradients on one of `hidden_tasks`.
struct Kernel {
  int64_t (*offset_tasks)(const Call&);
  int64_t (*hidden_tasks)(const Call&);
  void (*forward)(const Call&, int64_t task);
  void (*slopes)(const Call&, int64_t task);
  void (*gradients)(const Call&, int64_t task);
};

extern const Kernel portable;
#if defined(__x86_64__)
extern const Kernel avx2, avx512, avx512_bf16, amx_bf16;
#endif

}  // namespace swinv2_position_bias
