// The table of position biases as PyTorch sees it; see position_bias_cpu.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "instruction_sets.h"
#include "position_bias_cpu.h"

namespace swinv2_position_bias {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernel& kernel() {
  static const Kernel* const sets[] = EVERY_INSTRUCTION_SET;
  return *sets[instruction_sets::chosen()];
}

float* numbers(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float, name,
                  " must be float32, contiguous and on the CPU");
  STD_TORCH_CHECK(tensor.numel() == rows * columns, name, " has ", tensor.numel(), " elements, not ", rows * columns);
  return static_cast<float*>(tensor.data_ptr());
}

Call call_of(const Tensor& coordinates, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2) {
  STD_TORCH_CHECK(coordinates.dim() == 2 && weight2.dim() == 2, "coordinates and weight2 must have two dimensions");
  Call call{};
  call.offsets = coordinates.size(0), call.axes = int(coordinates.size(1));
  call.hidden = int(weight2.size(1)), call.heads = int(weight2.size(0));
  STD_TORCH_CHECK(call.axes <= MAX_AXES && call.heads <= MAX_HEADS && call.hidden % 16 == 0, "at most ", MAX_AXES, " axes, ",
                  MAX_HEADS, " heads, and a multiple of 16 hidden units");
  call.coordinates = numbers("coordinates", coordinates, call.offsets, call.axes);
  call.weight1 = numbers("weight1", weight1, call.hidden, call.axes), call.bias1 = numbers("bias1", bias1, call.hidden, 1);
  call.weight2 = numbers("weight2", weight2, call.heads, call.hidden);
  return call;
}

void over(int64_t tasks, const Call& call, void (*work)(const Call&, int64_t)) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) work(call, task);
  });
}

Tensor forward(Tensor coordinates, Tensor weight1, Tensor bias1, Tensor weight2) {
  Call call = call_of(coordinates, weight1, bias1, weight2);
  Tensor out = torch::stable::new_empty(weight2, {call.heads, call.offsets});
  call.out = static_cast<float*>(out.data_ptr());
  over(kernel().offset_tasks(call), call, kernel().forward);
  return out;
}

// The gradients of weight1, bias1 and weight2, from forward's output and its gradient.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor out, Tensor coordinates, Tensor weight1, Tensor bias1,
                                            Tensor weight2) {
  Call call = call_of(coordinates, weight1, bias1, weight2);
  call.grad = numbers("grad", grad, call.heads, call.offsets), call.out = numbers("out", out, call.heads, call.offsets);
  Tensor slopes = torch::stable::new_empty(out, {call.offsets, call.heads});
  Tensor of_weight1 = torch::stable::empty_like(weight1), of_bias1 = torch::stable::empty_like(bias1);
  Tensor of_weight2 = torch::stable::empty_like(weight2);
  call.slopes = static_cast<float*>(slopes.data_ptr());
  call.weight1_grad = static_cast<float*>(of_weight1.data_ptr()), call.bias1_grad = static_cast<float*>(of_bias1.data_ptr());
  call.weight2_grad = static_cast<float*>(of_weight2.data_ptr());
  over(kernel().offset_tasks(call), call, kernel().slopes);
  over(kernel().hidden_tasks(call), call, kernel().gradients);
  return {of_weight1, of_bias1, of_weight2};
}

}  // namespace
}  // namespace swinv2_position_bias

STABLE_TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def("position_bias_forward(Tensor coordinates, Tensor weight1, Tensor bias1, Tensor weight2) -> Tensor");
  m.def(
      "position_bias_backward(Tensor grad, Tensor out, Tensor coordinates, Tensor weight1, Tensor bias1, Tensor weight2) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("position_bias_forward", TORCH_BOX(&swinv2_position_bias::forward));
  m.impl("position_bias_backward", TORCH_BOX(&swinv2_position_bias::backward));
}
