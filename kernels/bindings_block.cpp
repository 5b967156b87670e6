// The parts of a block as PyTorch sees them; see block_cpu.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "block_cpu.h"
#include "instruction_sets.h"
#include "partials.h"

namespace swinv2_block {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernel& kernel_for(const Tensor& map) {
#if defined(__x86_64__)
  static const InstructionSet* const sets[] = {&portable, &avx2, &avx512, &avx512_bf16, &amx_bf16};
#else
  static const InstructionSet* const sets[] = {&portable};
#endif
  const InstructionSet& set = *sets[instruction_sets::chosen()];
  switch (map.scalar_type()) {
    case ScalarType::Float: return set.float32;
    case ScalarType::BFloat16: return set.bfloat16;
    case ScalarType::Half: return set.float16;
    case ScalarType::Double: return set.float64;
    default: STD_TORCH_CHECK(false, "a map must be float32, bfloat16, float16 or float64");
  }
}

ScalarType exact_type(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check(const char* name, const Tensor& tensor, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, " must be contiguous and on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong type");
  STD_TORCH_CHECK(tensor.numel() == count, name, " has ", tensor.numel(), " elements, not ", count);
}

int64_t channels_of(const Tensor& map) {
  STD_TORCH_CHECK(map.dim() >= 1 && map.size(map.dim() - 1) > 0 && map.size(map.dim() - 1) % 16 == 0,
                  "a map must have a multiple of 16 channels");
  check("a map", map, map.scalar_type(), map.numel());
  return map.size(map.dim() - 1);
}

// As many as keep many threads busy; never a function of how many there are, so that sums are added in one order.
int64_t chunks_of(int64_t rows) { return rows < 32 ? rows : 32; }

void over_rows(int64_t rows, int64_t channels, auto work) {
  torch::stable::parallel_for(0, rows, 1 + (1 << 15) / channels, work);
}
void over_chunks(int64_t chunks, auto work) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) work(chunk);
  });
}

// The sum of every chunk's part, (chunks, *sizes) -> sizes.
Tensor sum_of(const Tensor& parts, const std::vector<int64_t>& sizes, int64_t chunks) {
  Tensor total = torch::stable::new_empty(parts, sizes);
  partials::sum(parts, total, chunks);
  return total;
}

NormCall norm_call(const Tensor& y, const Tensor& weight, const std::optional<Tensor>& keep) {
  NormCall call{};
  call.channels = int(channels_of(y));
  call.rows = y.numel() / call.channels;
  call.chunks = chunks_of(call.rows);
  call.rows_per_image = y.dim() > 1 && y.size(0) > 0 ? call.rows / y.size(0) : 1;
  check("weight", weight, exact_type(y), call.channels);
  if (keep) check("keep", *keep, exact_type(y), y.size(0)), call.keep = keep->data_ptr();
  call.y = y.data_ptr(), call.weight = weight.data_ptr();
  return call;
}

std::tuple<Tensor, Tensor> residual_norm_forward(Tensor x, Tensor y, Tensor weight, Tensor bias, std::optional<Tensor> keep,
                                                 double eps) {
  NormCall call = norm_call(y, weight, keep);
  check("x", x, y.scalar_type(), y.numel());
  check("bias", bias, exact_type(y), call.channels);
  Tensor out = torch::stable::empty_like(y);
  Tensor statistics = torch::stable::new_empty(weight, {call.rows, 2});
  call.eps = eps, call.x = x.data_ptr(), call.bias = bias.data_ptr();
  call.out = out.data_ptr(), call.statistics = statistics.data_ptr();
  const Kernel& kernel = kernel_for(y);
  over_rows(call.rows, call.channels, [&](int64_t first, int64_t last) { kernel.norm_forward(call, first, last); });
  return {out, statistics};
}

std::tuple<Tensor, Tensor> residual_norm_backward(Tensor grad_out, Tensor y, Tensor weight, std::optional<Tensor> keep,
                                                  Tensor statistics) {
  NormCall call = norm_call(y, weight, keep);
  check("grad_out", grad_out, y.scalar_type(), y.numel());
  check("statistics", statistics, exact_type(y), 2 * call.rows);
  Tensor grad_y = torch::stable::empty_like(y);
  Tensor partials = torch::stable::new_empty(weight, {call.chunks, 2, call.channels});
  call.grad_out = grad_out.data_ptr(), call.statistics = statistics.data_ptr();
  call.grad_y = grad_y.data_ptr(), call.partials = partials.data_ptr();
  const Kernel& kernel = kernel_for(y);
  over_chunks(call.chunks, [&](int64_t chunk) { kernel.norm_backward(call, chunk); });
  return {grad_y, sum_of(partials, {2, call.channels}, call.chunks)};
}

MapCall map_call(const Tensor& input) {
  MapCall call{};
  call.channels = int(channels_of(input));
  call.rows = input.numel() / call.channels;
  call.chunks = chunks_of(call.rows);
  call.input = input.data_ptr();
  return call;
}

Tensor gelu_forward(Tensor input) {
  MapCall call = map_call(input);
  Tensor out = torch::stable::empty_like(input);
  call.out = out.data_ptr();
  const Kernel& kernel = kernel_for(input);
  over_rows(call.rows, call.channels, [&](int64_t first, int64_t last) { kernel.gelu_forward(call, first, last); });
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward(Tensor grad, Tensor input) {
  MapCall call = map_call(input);
  check("grad", grad, input.scalar_type(), input.numel());
  Tensor out = torch::stable::empty_like(input);
  Tensor partials = torch::stable::new_empty(input, {call.chunks, call.channels}, exact_type(input));
  call.grad = grad.data_ptr(), call.out = out.data_ptr(), call.partials = partials.data_ptr();
  const Kernel& kernel = kernel_for(input);
  over_chunks(call.chunks, [&](int64_t chunk) { kernel.gelu_backward(call, chunk); });
  return {out, sum_of(partials, {call.channels}, call.chunks)};
}

Tensor sum_rows(Tensor input) {
  MapCall call = map_call(input);
  Tensor partials = torch::stable::new_empty(input, {call.chunks, call.channels}, exact_type(input));
  call.partials = partials.data_ptr();
  const Kernel& kernel = kernel_for(input);
  over_chunks(call.chunks, [&](int64_t chunk) { kernel.sum_rows(call, chunk); });
  return sum_of(partials, {call.channels}, call.chunks);
}

}  // namespace
}  // namespace swinv2_block

STABLE_TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def("residual_norm_forward(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor? keep, float eps) -> (Tensor, Tensor)");
  m.def(
      "residual_norm_backward(Tensor grad_out, Tensor y, Tensor weight, Tensor? keep, Tensor statistics) -> (Tensor, Tensor)");
  m.def("gelu_forward(Tensor input) -> Tensor");
  m.def("gelu_backward(Tensor(a!) grad, Tensor input) -> (Tensor, Tensor)");
  m.def("sum_rows(Tensor input) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("residual_norm_forward", TORCH_BOX(&swinv2_block::residual_norm_forward));
  m.impl("residual_norm_backward", TORCH_BOX(&swinv2_block::residual_norm_backward));
  m.impl("gelu_forward", TORCH_BOX(&swinv2_block::gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&swinv2_block::gelu_backward));
  m.impl("sum_rows", TORCH_BOX(&swinv2_block::sum_rows));
}
