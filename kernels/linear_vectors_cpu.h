// What bindings_linear.cpp knows of linear_vectors_cpu.cpp, which is compiled once per instruction set.

#pragma once

#include "linear_cpu.h"
#include "weight_gradient_cpu.h"

namespace swinv2_linear_vectors {

struct Kernels {
  swinv2_linear::Kernel product;
  swinv2_weight_gradient::Kernel weight_gradient;
};

struct Types {
  Kernels bfloat16, float32;
};

extern const Types portable;
#if defined(__x86_64__)
extern const Types avx2, avx512, avx512_bf16, amx_bf16;
#endif

}  // namespace swinv2_linear_vectors
