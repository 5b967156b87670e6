// What bindings_linear.cpp knows of linear_cpu.cpp and linear_vectors_cpu.cpp, which are compiled once per instruction set.

#pragma once

#include <cstdint>

namespace swinv2_linear {

// All is bfloat16, by vectors also float32; sums are float32. Channels are multiples of 32.
struct Call {
  int64_t rows, chunks;  // tokens; how many parts they are taken in
  int inputs, outputs;   // channels that are summed over; channels of the result
  bool transposed;       // the weight is (outputs, inputs), as in forward; else (inputs, outputs)
  const void *x, *weight, *bias;  // x (rows, inputs); bias (outputs), or null
  void *panels, *out;             // the weight laid out, as many numbers; (rows, outputs)
};

struct Kernel {
  void (*lay_out)(const Call&, int64_t band);  // 32 rows of the weight; all of them, in any order, then
  int64_t (*tasks)(const Call&);
  void (*task)(const Call&, int64_t number);   // in any order
};

extern const Kernel portable;
#if defined(__x86_64__)
extern const Kernel avx2, avx512, avx512_bf16, amx_bf16;
#endif

}  // namespace swinv2_linear
