// What bindings_block.cpp knows of block_cpu.cpp, which is compiled once per instruction set.

#pragma once

#include <cstdint>

namespace swinv2_block {

// Rows are tokens; channels are a multiple of 16. What is not stored per token and channel is float32, or float64 when the
// maps are. Forward functions work on rows first … last - 1. Backward functions work on one of a number of chunks of rows
// and write its part of a sum over rows.
struct NormCall {
  int64_t rows, rows_per_image, chunks;
  int channels;
  double eps;
  const void *x, *y;             // (rows, channels)
  const void *weight, *bias;     // (channels)
  const void* keep;              // (images) factors of drop path, or null
  void *out, *statistics;        // (rows, channels), (rows, 2)
  const void* grad_out;          // (rows, channels); the rest is backward's
  void *grad_y, *partials;       // (rows, channels), (chunks, 2, channels)
};

struct MapCall {
  int64_t rows, chunks;
  int channels;
  const void* input;  // (rows, channels)
  void *out, *grad;   // (rows, channels)
  void* partials;     // (chunks, channels)
};

struct Kernel {
  void (*norm_forward)(const NormCall&, int64_t first, int64_t last);
  void (*norm_backward)(const NormCall&, int64_t chunk);
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
