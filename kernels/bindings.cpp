// The operators as PyTorch sees them: schema, checks, and the CPU implementation. Built against the stable ABI, so that one
// binary serves every PyTorch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "cosine_window_attention_cpu.h"
#include "instruction_sets.h"
#include "partials.h"

namespace cosine_window_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const InstructionSet& instruction_set() {
  static const InstructionSet* const sets[] = EVERY_INSTRUCTION_SET;
  return *sets[instruction_sets::chosen()];
}

const Kernel& kernel_for(ScalarType type) {
  const InstructionSet& set = instruction_set();
  switch (type) {
    case ScalarType::Float: return set.float32;
    case ScalarType::BFloat16: return set.bfloat16;
    case ScalarType::Half: return set.float16;
    case ScalarType::Double: return set.float64;
    default: STD_TORCH_CHECK(false, "qkv must be float32, bfloat16, float16 or float64");
  }
}

// -- arguments -----------------------------------------------------------------------------------------------------------

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

void check_tensor(const char* name, const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must lie on the CPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong type for qkv");
  bool fits = tensor.dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(int64_t(i)) == sizes[i];
  STD_TORCH_CHECK(fits, name, " has the wrong shape for qkv, window and shift");
}

// Type of everything that is not stored per token and channel.
ScalarType exact_type(const Tensor& qkv) {
  return qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Problem problem_of(const Tensor& qkv, const Tensor& logit_scale, const Tensor& bias_table, const std::vector<int64_t>& window,
                   const std::vector<int64_t>& shift, double mask_value) {
  const int axes = int(qkv.dim()) - 4;
  STD_TORCH_CHECK((axes == 2 || axes == 3) && qkv.size(axes + 1) == 3,
                  "qkv must be (B, Y, X, 3, H, D) or (B, T, Y, X, 3, H, D)");
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.is_contiguous(), "qkv must be contiguous and on the CPU");
  STD_TORCH_CHECK(int(window.size()) == axes && int(shift.size()) == axes, "window and shift must have ", axes, " values");
  Problem p{};
  p.batch = qkv.size(0);
  p.heads = int(qkv.size(axes + 2));
  p.width = int(qkv.size(axes + 3));
  p.mask_value = float(mask_value);
  STD_TORCH_CHECK(p.width >= 8 && p.width <= MAX_WIDTH && p.width % 8 == 0,
                  "head width must be a multiple of 8 in 8 … 128, got ", p.width);
  std::vector<int64_t> table{p.heads};
  for (int axis = 0; axis < AXES; ++axis) {
    const int source = axis - (AXES - axes);
    p.grid[axis] = source < 0 ? 1 : int(qkv.size(source + 1));
    p.window[axis] = source < 0 ? 1 : int(window[source]);
    p.shift[axis] = source < 0 ? 0 : int(shift[source]);
    if (source < 0) continue;
    STD_TORCH_CHECK(window[source] >= 1 && window[source] <= MAX_WINDOW, "window must be 1 … ", MAX_WINDOW,
                    " tokens per axis, got ", window[source]);
    STD_TORCH_CHECK(shift[source] >= 0 && shift[source] < window[source], "shift must be 0 … window - 1, got ",
                    shift[source]);
    table.push_back(2 * window[source] - 1);
  }
  check_tensor("logit_scale", logit_scale, exact_type(qkv), {p.heads});
  check_tensor("bias_table", bias_table, exact_type(qkv), table);
  return p;
}

// -- running -------------------------------------------------------------------------------------------------------------

// Chunks of windows, which with heads make the tasks: enough for many threads, and never a function of how many there
// are, so that sums are added in one order. A chunk of more windows lays out the bias, and adds up its gradient, fewer
// times. Partial gradients of the table grow with the chunks; at one chunk per window they take a twelfth of a bfloat16 qkv
// with heads of 32 in two dimensions, a sixth in three.
int64_t chunks_of(const Problem& p) {
  const int64_t windows = p.batch * p.windows(), most = p.heads > 16 ? 8 : 128 / p.heads;
  return windows < most ? windows : most;
}

template <class Run>
void run_tasks(const Call& call, const Kernel& kernel, Run run) {
  const size_t bytes = kernel.scratch_bytes(call.problem);
  torch::stable::parallel_for(0, call.chunks * call.problem.heads, 1, [&](int64_t first, int64_t last) {
    std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    STD_TORCH_CHECK(scratch, "out of memory: ", bytes, " bytes of scratch");
    std::memset(scratch.get(), 0, bytes);
    for (int64_t task = first; task < last; ++task) run(call, task, scratch.get());
  });
}

std::tuple<Tensor, Tensor> forward(Tensor qkv, Tensor logit_scale, Tensor bias_table, std::vector<int64_t> window,
                                   std::vector<int64_t> shift, double mask_value) {
  Call call{};
  call.problem = problem_of(qkv, logit_scale, bias_table, window, shift, mask_value);
  const Problem& p = call.problem;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < qkv.dim() - 3; ++i) sizes.push_back(qkv.size(i));
  sizes.push_back(int64_t(p.heads) * p.width);
  Tensor out = torch::stable::new_empty(qkv, sizes);
  sizes.back() = p.heads;
  Tensor lse = torch::stable::new_empty(qkv, sizes, exact_type(qkv));
  if (out.numel() == 0) return {out, lse};
  call.chunks = chunks_of(p);
  call.qkv = qkv.data_ptr(), call.logit_scale = logit_scale.data_ptr(), call.bias_table = bias_table.data_ptr();
  call.out = out.data_ptr(), call.lse = lse.data_ptr();
  const Kernel& kernel = kernel_for(qkv.scalar_type());
  run_tasks(call, kernel, kernel.forward);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor qkv, Tensor logit_scale, Tensor bias_table, Tensor out,
                                            Tensor lse, std::vector<int64_t> window, std::vector<int64_t> shift,
                                            double mask_value) {
  Call call{};
  call.problem = problem_of(qkv, logit_scale, bias_table, window, shift, mask_value);
  const Problem& p = call.problem;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < qkv.dim() - 3; ++i) sizes.push_back(qkv.size(i));
  sizes.push_back(int64_t(p.heads) * p.width);
  check_tensor("grad_out", grad_out, qkv.scalar_type(), sizes);
  check_tensor("out", out, qkv.scalar_type(), sizes);
  sizes.back() = p.heads;
  const ScalarType exact = exact_type(qkv);
  check_tensor("lse", lse, exact, sizes);
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  Tensor grad_scale = torch::stable::new_zeros(logit_scale, {p.heads});
  Tensor grad_table = torch::stable::empty_like(bias_table);
  torch::stable::zero_(grad_table);
  if (out.numel() == 0) return {grad_qkv, grad_scale, grad_table};
  call.chunks = chunks_of(p);
  Tensor scale_partials = torch::stable::new_empty(logit_scale, {call.chunks, p.heads});
  Tensor bias_partials = torch::stable::new_empty(bias_table, {call.chunks, p.heads, p.offsets()});
  call.qkv = qkv.data_ptr(), call.logit_scale = logit_scale.data_ptr(), call.bias_table = bias_table.data_ptr();
  call.out = out.data_ptr(), call.lse = lse.data_ptr(), call.grad_out = grad_out.data_ptr();
  call.grad_qkv = grad_qkv.data_ptr();
  call.scale_partials = scale_partials.data_ptr(), call.bias_partials = bias_partials.data_ptr();
  const Kernel& kernel = kernel_for(qkv.scalar_type());
  run_tasks(call, kernel, kernel.backward);
  partials::sum(scale_partials, grad_scale, call.chunks);
  partials::sum(bias_partials, grad_table, call.chunks);
  return {grad_qkv, grad_scale, grad_table};
}

}  // namespace
}  // namespace cosine_window_attention

STABLE_TORCH_LIBRARY(swinv2_scale, m) {
  m.def(
      "cosine_window_attention_forward(Tensor qkv, Tensor logit_scale, Tensor bias_table, int[] window, int[] shift, "
      "float mask_value) -> (Tensor, Tensor)");
  m.def(
      "cosine_window_attention_backward(Tensor grad_out, Tensor qkv, Tensor logit_scale, Tensor bias_table, Tensor out, "
      "Tensor lse, int[] window, int[] shift, float mask_value) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("cosine_window_attention_forward", TORCH_BOX(&cosine_window_attention::forward));
  m.impl("cosine_window_attention_backward", TORCH_BOX(&cosine_window_attention::backward));
}
