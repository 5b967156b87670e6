// The products of a linear layer and its gradients as PyTorch sees them; see linear_cpu.cpp, weight_gradient_cpu.cpp
// and linear_vectors_cpu.cpp.

#include "bindings_linear.h"

namespace swinv2_linear {
namespace {

std::string products(ScalarType type) { return choice(type).name; }

Tensor product(const Tensor& x, const Tensor& weight, bool transposed, const std::optional<Tensor>& bias) {
  Product product(x, weight, transposed, bias);
  Call& call = product.call;
  check_channels("x", x.size(1), call.inputs);
  const int64_t strips = (call.rows + 31) / 32;
  call.chunks = strips < 8 ? 1 : strips < 256 ? strips / 4 : 64;
  Tensor out = torch::stable::new_empty(x, {call.rows, call.outputs});
  call.out = out.data_ptr();
  over_tasks(product.kernel.tasks(call), [&](int64_t task, int64_t) { product.kernel.task(call, task); });
  return out;
}

Tensor linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias) { return product(x, weight, true, bias); }
Tensor linear_backward(Tensor grad, Tensor weight) { return product(grad, weight, false, std::nullopt); }

std::tuple<Tensor, Tensor> weight_gradient(Tensor grad, Tensor x) {
  const ScalarType type = grad.scalar_type();
  check("grad", grad, type), check("x", x, type);
  STD_TORCH_CHECK(x.size(0) == grad.size(0), "x has ", x.size(0), " tokens, grad ", grad.size(0));
  Gradient found(grad, grad.size(0), grad.size(1), x.size(1), Gradient::chunks_of(grad.size(0)) > 1);
  found.call.grad = grad.data_ptr(), found.call.x = x.data_ptr();
  over_tasks(found.kernel.tasks(found.call), [&](int64_t task, int64_t) { found.kernel.task(found.call, task); });
  found.add_chunks();
  return {found.out, found.bias};
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
