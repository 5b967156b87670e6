// Sums over chunks: each chunk of a backward pass writes its part, and parts are added in their order, so that a result does
// not depend on the number of threads.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace partials {

template <class T>
void add(const torch::stable::Tensor& parts, torch::stable::Tensor& total, int64_t chunks) {
  const T* from = static_cast<const T*>(parts.data_ptr());
  T* to = static_cast<T*>(total.data_ptr());
  const int64_t count = total.numel();
  torch::stable::parallel_for(0, count, 1 << 12, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) to[i] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = first; i < last; ++i) to[i] += from[chunk * count + i];
  });
}

// parts (chunks, *sizes) -> total (sizes), both float32 or both float64.
inline void sum(const torch::stable::Tensor& parts, torch::stable::Tensor& total, int64_t chunks) {
  (parts.scalar_type() == torch::headeronly::ScalarType::Double ? add<double> : add<float>)(parts, total, chunks);
}

}  // namespace partials
