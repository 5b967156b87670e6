// The products of a linear layer and its gradients as PyTorch sees them; see linear_cpu.cpp, weight_gradient_cpu.cpp
// and linear_vectors_cpu.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "instruction_sets.h"
#include "linear_cpu.h"
#include "linear_vectors_cpu.h"
#include "partials.h"
#include "weight_gradient_cpu.h"

namespace swinv2_linear {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Choice {
  const char* name;  // "tiles", "vectors" or "none"
  swinv2_linear_vectors::Kernels kernels;
};

// What this process multiplies maps of a type with.
Choice choice(ScalarType type) {
#if defined(__x86_64__)
  const auto& vectors = swinv2_linear_vectors::avx512_bf16;
  const std::string set = instruction_sets::NAMES[instruction_sets::chosen()];
  if (type == ScalarType::BFloat16 && set == "amx_bf16") return {"tiles", {amx_bf16, swinv2_weight_gradient::amx_bf16}};
  if (type == ScalarType::BFloat16 && set == "avx512_bf16") return {"vectors", vectors.bfloat16};
  if (type == ScalarType::Float && set == "avx512_bf16") return {"vectors", vectors.float32};
#endif
  return {"none", {}};
}

std::string products(ScalarType type) { return choice(type).name; }

swinv2_linear_vectors::Kernels kernels(const Tensor& map) {
  const Choice found = choice(map.scalar_type());
  STD_TORCH_CHECK(std::strcmp(found.name, "none"), "this processor has no native products of maps of this type");
  return found.kernels;
}

void check(const char* name, const Tensor& matrix, ScalarType type) {
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.is_contiguous() && matrix.scalar_type() == type, name,
                  " must be contiguous, on the CPU and of the same type as the other");
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) > 0 && matrix.size(1) > 0 && matrix.size(1) % 32 == 0, name,
                  " must have two dimensions, the last a multiple of 32 channels");
}

void over_tasks(int64_t count, auto work) {
  std::atomic<int64_t> next = 0;  // who is slowed down takes fewer
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < count;) work(task);
  });
}

// x (rows, inputs) and a weight, (outputs, inputs) if it is to be transposed, else (inputs, outputs).
Tensor product(const Tensor& x, const Tensor& weight, bool transposed, const std::optional<Tensor>& bias) {
  const ScalarType type = x.scalar_type();
  const auto kernel = kernels(x).product;
  check("x", x, type), check("weight", weight, type);
  STD_TORCH_CHECK(weight.size(0) % 32 == 0, "weight must have a multiple of 32 channels in both dimensions");
  Call call{};
  call.transposed = transposed, call.rows = x.size(0);
  call.inputs = int(weight.size(transposed)), call.outputs = int(weight.size(!transposed));
  STD_TORCH_CHECK(x.size(1) == call.inputs, "x has ", x.size(1), " channels, the weight ", call.inputs);
  if (bias) {
    const bool fits = bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == type;
    STD_TORCH_CHECK(fits && bias->numel() == call.outputs, "bias must be ", call.outputs,
                    " numbers, of x's type, contiguous and on the CPU");
    call.bias = bias->data_ptr();
  }
  const int64_t strips = (call.rows + 31) / 32;
  call.chunks = strips < 8 ? 1 : strips < 256 ? strips / 4 : 64;
  Tensor panels = torch::stable::empty_like(weight), out = torch::stable::new_empty(x, {call.rows, call.outputs});
  call.x = x.data_ptr(), call.weight = weight.data_ptr(), call.panels = panels.data_ptr(), call.out = out.data_ptr();
  over_tasks(weight.size(0) / 32, [&](int64_t band) { kernel.lay_out(call, band); });
  over_tasks(kernel.tasks(call), [&](int64_t task) { kernel.task(call, task); });
  return out;
}

Tensor linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias) { return product(x, weight, true, bias); }
Tensor linear_backward(Tensor grad, Tensor weight) { return product(grad, weight, false, std::nullopt); }

std::tuple<Tensor, Tensor> weight_gradient(Tensor grad, Tensor x) {
  const ScalarType type = grad.scalar_type();
  check("grad", grad, type), check("x", x, type);
  STD_TORCH_CHECK(x.size(0) == grad.size(0), "x has ", x.size(0), " tokens, grad ", grad.size(0));
  const auto kernel = kernels(grad).weight_gradient;
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
  m.def("products(ScalarType type) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&swinv2_linear::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&swinv2_linear::linear_backward));
  m.impl("weight_gradient", TORCH_BOX(&swinv2_linear::weight_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CompositeExplicitAutograd, m) {
  m.impl("products", TORCH_BOX(&swinv2_linear::products));
}
