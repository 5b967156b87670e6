// The gradient of a linear layer as PyTorch sees it; see weight_gradient_cpu.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "instruction_sets.h"
#include "partials.h"
#include "weight_gradient_cpu.h"

namespace swinv2_weight_gradient {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernel& kernel() {
#if defined(__x86_64__)
  static const Kernel* const sets[] = {&portable, &avx2, &avx512, &avx512_bf16, &amx_bf16};
  return *sets[instruction_sets::chosen()];
#else
  return portable;
#endif
}

bool has_weight_gradient() { return kernel().task != nullptr; }

void check(const char* name, const Tensor& map) {
  STD_TORCH_CHECK(map.is_cpu() && map.is_contiguous() && map.scalar_type() == ScalarType::BFloat16, name,
                  " must be bfloat16, contiguous and on the CPU");
  STD_TORCH_CHECK(map.dim() == 2 && map.size(0) > 0 && map.size(1) > 0 && map.size(1) % 32 == 0, name,
                  " must be (tokens, channels) with a multiple of 32 channels");
}

void over_tasks(int64_t count, auto work) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) work(task);
  });
}

std::tuple<Tensor, Tensor> weight_gradient(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(has_weight_gradient(), "weight_gradient needs a processor with AMX");
  check("grad", grad), check("x", x);
  STD_TORCH_CHECK(x.size(0) == grad.size(0), "x has ", x.size(0), " tokens, grad ", grad.size(0));
  Call call{};
  call.tokens = grad.size(0), call.outputs = int(grad.size(1)), call.inputs = int(x.size(1));
  call.threads = int(torch::stable::get_num_threads());
  // As many chunks as keep many threads busy; never a function of how many there are.
  call.chunks = call.tokens < 4096 ? 1 : call.tokens < 32768 ? call.tokens / 2048 : 16;
  Tensor parts = torch::stable::new_empty(grad, {call.chunks, call.outputs, call.inputs}, ScalarType::Float);
  Tensor bias_parts = torch::stable::new_empty(parts, {call.chunks, call.outputs});
  Tensor out = torch::stable::new_empty(grad, {call.outputs, call.inputs});
  Tensor bias = torch::stable::new_empty(parts, {call.outputs});
  call.grad = grad.data_ptr(), call.x = x.data_ptr(), call.weight_grad = out.data_ptr();
  call.weight_parts = static_cast<float*>(parts.data_ptr());
  call.bias_parts = static_cast<float*>(bias_parts.data_ptr());
  over_tasks(kernel().tasks(call), [&](int64_t task) { kernel().task(call, task); });
  over_tasks(call.outputs / 32 * (call.inputs / 32), [&](int64_t square) { kernel().add_parts(call, square); });
  partials::sum(bias_parts, bias, call.chunks);
  return {out, bias};
}

}  // namespace
}  // namespace swinv2_weight_gradient

STABLE_TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def("weight_gradient(Tensor grad, Tensor x) -> (Tensor, Tensor)");
  m.def("has_weight_gradient() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("weight_gradient", TORCH_BOX(&swinv2_weight_gradient::weight_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CompositeExplicitAutograd, m) {
  m.impl("has_weight_gradient", TORCH_BOX(&swinv2_weight_gradient::has_weight_gradient));
}
