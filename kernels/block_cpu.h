// What bindings_block.cpp knows of block_cpu.cpp, which is compiled once per instruction set.

#pragma once

#include "block.h"

namespace swinv2_block {

// Forward functions work on rows first … last - 1, backward functions on one chunk of rows.
struct Kernel {
  void (*norm_forward)(const NormCall&, int64_t first, int64_t last);
  void (*norm_backward)(const NormCall&, int64_t chunk);
  void (*add_images)(const NormCall&, int64_t first, int64_t last);
  void (*gelu_forward)(const MapCall&, int64_t first, int64_t last);
  void (*gelu_backward)(const MapCall&, int64_t chunk);
  void (*sum_rows)(const MapCall&, int64_t chunk);
};

struct InstructionSet {
  Kernel float32, bfloat16, float16, float64;
};

extern const InstructionSet portable;
#if defined(__x86_64__)
extern const InstructionSet avx2, avx512, avx512_bf16, amx_bf16;
#endif

}  // namespace swinv2_block
