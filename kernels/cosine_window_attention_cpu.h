// What bindings.cpp knows of the CPU kernel. cosine_window_attention_cpu.cpp is compiled once per instruction set, and
// each compilation defines one of the tables below.

#pragma once

#include <cstddef>
#include <cstdint>

#include "cosine_window_attention.h"

namespace cosine_window_attention {

// The tensors of one call. Scale, table, log-sum-exp and partial gradients are float32, or float64 when qkv is.
struct Call {
  Problem problem;
  int64_t chunks;  // of all windows; a task is one head of one chunk, and works alone
  const void *qkv, *logit_scale, *bias_table;
  void *out, *lse;       // written by forward, read by backward
  const void* grad_out;  // the rest is backward's
  void* grad_qkv;
  void* scale_partials;  // (chunks, H)
  void* bias_partials;   // (chunks, H, offsets)
};

struct Kernel {
  size_t (*scratch_bytes)(const Problem&);
  void (*forward)(const Call&, int64_t task, void* scratch);
  void (*backward)(const Call&, int64_t task, void* scratch);
};

struct InstructionSet {
  Kernel float32, bfloat16, float16, float64;
};

extern const InstructionSet portable;
#if defined(__x86_64__)
extern const InstructionSet avx2, avx512, avx512_bf16, amx_bf16;
#endif

}  // namespace cosine_window_attention
