// What bindings_linear.cpp knows of weight_gradient_cpu.cpp and linear_vectors_cpu.cpp, which are compiled once per
// instruction set.

#pragma once

#include <cstdint>

namespace swinv2_weight_gradient {

// Maps are bfloat16, by vectors also float32; sums are float32. Channels are multiples of 32.
struct Call {
  int64_t tokens, chunks;            // of tokens: each has a part of the sums
  int outputs, inputs, threads;      // channels of the layer; how many threads share the tasks
  const void *grad, *x;              // (tokens, outputs), (tokens, inputs)
  float *weight_parts, *bias_parts;  // (chunks, outputs · inputs), null if there is one; (chunks, outputs)
  bool continues;                    // by vectors: parts hold the sums of the tokens before
  void* weight_grad;                 // (outputs, inputs), in the type of maps
};

struct Kernel {
  int64_t (*tasks)(const Call&);
  void (*task)(const Call&, int64_t number);   // any order, any thread; after all of them
  void (*add_parts)(const Call&, int64_t row);  // 32 × 32 of weight_grad
};

extern const Kernel portable;
#if defined(__x86_64__)
extern const Kernel avx2, avx512, avx512_bf16, amx_bf16;
#endif

}  // namespace swinv2_weight_gradient
