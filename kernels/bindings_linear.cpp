// The products of a linear layer and its gradients as PyTorch sees them; see linear_cpu.cpp and weight_gradient_cpu.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "instruction_sets.h"
#include "linear_cpu.h"
#include "partials.h"
#include "weight_gradient_cpu.h"

namespace swinv2_linear {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool has_tiles() { return std::strcmp(instruction_sets::NAMES[instruction_sets::chosen()], "amx_bf16") == 0; }

#if defined(__x86_64__)
const Kernel& kernel() { return amx_bf16; }
const swinv2_weight_gradient::Kernel& weight_gradient_kernel() { return swinv2_weight_gradient::amx_bf16; }
#else
const Kernel& kernel() { return portable; }
const swinv2_weight_gradient::Kernel& weight_gradient_kernel() { return swinv2_weight_gradient::portable; }
#endif

void check(const char* name, const Tensor& matrix) {
  STD_TORCH_CHECK(has_tiles(), "this product needs a processor with AMX");
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.is_contiguous() && matrix.scalar_type() == ScalarType::BFloat16, name,
                  " must be bfloat16, contiguous and on the CPU");
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) > 0 && matrix.size(1) > 0 && matrix.size(1) % 32 == 0, name,
                  " must have two dimensions, the last a multiple of 32 channels");
}

void over_tasks(int64_t count, auto work) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) work(task);
  });
}

// x (rows, inputs) and a weight, (outputs, inputs) if it is to be transposed, else (inputs, outputs).
Tensor product(const Tensor& x, const Tensor& weight, bool transposed, const std::optional<Tensor>& bias) {
  check("x", x), check("weight", weight);
  STD_TORCH_CHECK(weight.size(0) % 32 == 0, "weight must have a multiple of 32 channels in both dimensions");
  Call call{};
  call.transposed = transposed, call.rows = x.size(0);
  call.inputs = int(weight.size(transposed)), call.outputs = int(weight.size(!transposed));
  STD_TORCH_CHECK(x.size(1) == call.inputs, "x has ", x.size(1), " channels, the weight ", call.inputs);
  if (bias) {
    const bool fits = bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(fits && bias->numel() == call.outputs, "bias must be ", call.outputs,
                    " numbers, bfloat16, contiguous and on the CPU");
    call.bias = bias->data_ptr();
  }
  const int64_t strips = (call.rows + 31) / 32;
  call.chunks = strips < 8 ? 1 : strips < 256 ? strips / 4 : 64;
  Tensor panels = torch::stable::empty_like(weight), out = torch::stable::new_empty(x, {call.rows, call.outputs});
  call.x = x.data_ptr(), call.weight = weight.data_ptr(), call.panels = panels.data_ptr(), call.out = out.data_ptr();
  over_tasks(weight.size(0) / 32, [&](int64_t band) { kernel().lay_out(call, band); });
  over_tasks(kernel().tasks(call), [&](int64_t task) { kernel().task(call, task); });
  return out;
}

Tensor linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias) { return product(x, weight, true, bias); }
Tensor linear_backward(Tensor grad, Tensor weight) { return product(grad, weight, false, std::nullopt); }

std::tuple<Tensor, Tensor> weight_gradient(Tensor grad, Tensor x) {
  check("grad", grad), check("x", x);
  STD_TORCH_CHECK(x.size(0) == grad.size(0), "x has ", x.size(0), " tokens, grad ", grad.size(0));
  const auto& kernel = weight_gradient_kernel();
  swinv2_weight_gradient::Call call{};
  call.tokens = grad.size(0), call.outputs = int(grad.size(1)), call.inputs = int(x.size(1));
  call.threads = int(torch::stable::get_num_threads());
  // As many chunks as keep many threads busy; never a function of how many there are.
  call.chunks = call.tokens < 4096 ? 1 : call.tokens < 32768 ? call.tokens / 2048 : 16;
  const int64_t kept = call.chunks > 1 ? call.chunks : 0;  // the only one's sums stay with the threads
  Tensor parts = torch::stable::new_empty(grad, {kept, call.outputs, call.inputs}, ScalarType::Float);
  Tensor bias_parts = torch::stable::new_empty(parts, {call.chunks, call.outputs});
  Tensor out = torch::stable::new_empty(grad, {call.outputs, call.inputs});
  Tensor bias = torch::stable::new_empty(parts, {call.outputs});
  call.grad = grad.data_ptr(), call.x = x.data_ptr(), call.weight_grad = out.data_ptr();
  call.weight_parts = static_cast<float*>(parts.data_ptr());
  call.bias_parts = static_cast<float*>(bias_parts.data_ptr());
  over_tasks(kernel.tasks(call), [&](int64_t task) { kernel.task(call, task); });
  if (kept) over_tasks(call.outputs / 32 * (call.inputs / 32), [&](int64_t square) { kernel.add_parts(call, square); });
  partials::sum(bias_parts, bias, call.chunks);
  return {out, bias};
}

}  // namespace
}  // namespace swinv2_linear

STABLE_TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_backward(Tensor grad, Tensor weight) -> Tensor");
  m.def("weight_gradient(Tensor grad, Tensor x) -> (Tensor, Tensor)");
  m.def("has_tiles() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&swinv2_linear::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&swinv2_linear::linear_backward));
  m.impl("weight_gradient", TORCH_BOX(&swinv2_linear::weight_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CompositeExplicitAutograd, m) {
  m.impl("has_tiles", TORCH_BOX(&swinv2_linear::has_tiles));
}
