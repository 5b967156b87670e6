// AdamW over flat weights as PyTorch sees it; see adamw_cpu.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "adamw_cpu.h"
#include "instruction_sets.h"

namespace swinv2_adamw {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 1 << 14;  // elements
constexpr int64_t PART = 1 << 16;   // elements of a partial sum of squares, which are added in their order

Kernel kernel(ScalarType gradient, ScalarType trained) {
  static const InstructionSet* const sets[] = EVERY_INSTRUCTION_SET;
  const InstructionSet& set = *sets[instruction_sets::chosen()];
  const bool wide = gradient == ScalarType::Float;
  STD_TORCH_CHECK(wide || gradient == trained, "a gradient must be float32 or of the type that weights train in");
  switch (trained) {
    case ScalarType::Float: return set.float32;
    case ScalarType::BFloat16: return wide ? set.bfloat16_from_float32 : set.bfloat16;
    case ScalarType::Half: return wide ? set.float16_from_float32 : set.float16;
    default: STD_TORCH_CHECK(false, "weights must train in float32, bfloat16 or float16");
  }
}

void* memory(const char* name, const Tensor& tensor, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, " must be contiguous and on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong type");
  STD_TORCH_CHECK(tensor.numel() == count, name, " has ", tensor.numel(), " elements, not ", count);
  return tensor.data_ptr();
}

void step(Tensor weights, Tensor mean, Tensor square, Tensor trained, Tensor gradient, double scale, double lr, double beta1,
          double beta2, double eps, double weight_decay, double steps) {
  const int64_t count = weights.numel();
  const Kernel chosen = kernel(gradient.scalar_type(), trained.scalar_type());
  Call call{};
  call.weights = static_cast<float*>(memory("weights", weights, ScalarType::Float, count));
  call.mean = static_cast<float*>(memory("mean", mean, ScalarType::Float, count));
  call.square = static_cast<float*>(memory("square", square, ScalarType::Float, count));
  call.trained = memory("trained", trained, trained.scalar_type(), count);
  call.gradient = memory("gradient", gradient, gradient.scalar_type(), count);
  call.scale = float(scale), call.keep = float(1 - lr * weight_decay);
  call.mean_new = float(1 - beta1), call.square_keep = float(beta2), call.square_new = float(1 - beta2);
  call.rate = float(lr / (1 - std::pow(beta1, steps))), call.root = float(std::sqrt(1 - std::pow(beta2, steps)));
  call.eps = float(eps);
  torch::stable::parallel_for(0, count, GRAIN, [&](int64_t first, int64_t last) { chosen.step(call, first, last); });
}

double squares(Tensor values) {
  const Kernel chosen = kernel(values.scalar_type(), values.scalar_type());
  const void* from = memory("a gradient", values, values.scalar_type(), values.numel());
  std::vector<double> parts((values.numel() + PART - 1) / PART);
  torch::stable::parallel_for(0, int64_t(parts.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      parts[part] = chosen.squares(from, part * PART, std::min(values.numel(), (part + 1) * PART));
  });
  double total = 0;
  for (const double part : parts) total += part;
  return total;
}

}  // namespace
}  // namespace swinv2_adamw

STABLE_TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def(
      "adamw_step(Tensor(a!) weights, Tensor(b!) mean, Tensor(c!) square, Tensor(d!) trained, Tensor gradient, float scale, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, float steps) -> ()");
  m.def("sum_of_squares(Tensor values) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("adamw_step", TORCH_BOX(&swinv2_adamw::step));
  m.impl("sum_of_squares", TORCH_BOX(&swinv2_adamw::squares));
}
