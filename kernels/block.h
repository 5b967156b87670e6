// The calls of a block's native parts, for a CPU and for a GPU.

#pragma once

#include <cstdint>

namespace swinv2_block {

// Rows are tokens; channels are a multiple of 16. What is not stored per token and channel is float32, or float64 when the
// maps are. Sums over rows are first those of a number of chunks of rows, which are then added in their order.
struct NormCall {
  int64_t rows, all_rows;        // of y; of x, which are more where some images have no branch
  int64_t rows_per_image, chunks;
  int channels;
  double eps;
  const void *x, *y;             // (all rows, channels), (rows, channels); on the CPU x may be null, for zero
  const void *weight, *bias;     // (channels)
  const void* keep;              // (images of y) factors of drop path, or null
  const int64_t* images;         // (images of x) an order of theirs: those that y has, then the others; null: y has all
  void *out, *statistics;        // (all rows, channels), (rows, 2)
  const void* grad_out;          // (all rows, channels); the rest is backward's
  void *grad_y, *partials;       // (rows, channels), (chunks, 2, channels)
};

struct MapCall {
  int64_t rows, chunks;
  int channels;
  const void* input;  // (rows, channels)
  void *out, *grad;   // (rows, channels)
  void* partials;     // (chunks, channels)
};

}  // namespace swinv2_block
