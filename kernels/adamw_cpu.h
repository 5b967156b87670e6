// What bindings_adamw.cpp knows of adamw_cpu.cpp, which is compiled once per instruction set.

#pragma once

#include <stdint.h>

namespace swinv2_adamw {

struct Call {
  float *weights, *mean, *square;  // master weights, and the moving averages of gradients and of their squares
  const void* gradient;
  void* trained;       // the weights once more, in the type that they train in
  float scale;         // of the gradient
  float keep;          // of the weights: 1 - learning rate · weight decay
  float mean_new, square_keep, square_new;  // 1 - β₁, β₂, 1 - β₂
  float rate;          // learning rate / correction of the mean
  float root;          // of the correction of the square
  float eps;
};

struct Kernel {
  // Elements first … last - 1.
  void (*step)(const Call&, int64_t first, int64_t last);
  double (*squares)(const void* values, int64_t first, int64_t last);
};

struct InstructionSet {
  Kernel bfloat16, float16, float32;                   // weights that train in this type, and gradients too
  Kernel bfloat16_from_float32, float16_from_float32;  // gradients in float32
};

extern const InstructionSet portable;
#if defined(__x86_64__)
extern const InstructionSet avx2, avx512, avx512_bf16, amx_bf16;
#endif

}  // namespace swinv2_adamw
