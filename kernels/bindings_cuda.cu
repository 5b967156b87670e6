// The CUDA kernels as PyTorch sees them, for the operators that bindings.cpp defines. Stable ABI, as there.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "cosine_window_attention_cuda.h"

namespace cosine_window_attention::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& qkv) {
  switch (qkv.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "cosine_window_attention: qkv must be float32, bfloat16 or float16 on CUDA");
  }
}

void check(const Tensor& x, const char* name, ScalarType type, const Tensor& qkv) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == qkv.get_device_index(), "cosine_window_attention: ", name,
                  " must lie on the device of qkv");
  STD_TORCH_CHECK(x.scalar_type() == type, "cosine_window_attention: ", name, " has the wrong type");
  STD_TORCH_CHECK(x.is_contiguous(), "cosine_window_attention: ", name, " must be contiguous");
}

// Rows are copied 16 bytes at a time.
void check_rows(const Tensor& x, const char* name, const Tensor& qkv) {
  check(x, name, qkv.scalar_type(), qkv);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "cosine_window_attention: ", name,
                  " must be aligned to 16 bytes");
}

// The sizes of a call, checked: a kernel must never read beyond a tensor, whoever calls the operator.
Problem problem_of(const Tensor& qkv, const Tensor& logit_scale, const Tensor& bias_table, const std::vector<int64_t>& window,
                   const std::vector<int64_t>& shift, double mask_value) {
  const int64_t axes = qkv.dim() - 4;
  STD_TORCH_CHECK((axes == 2 || axes == 3) && qkv.size(axes + 1) == 3, "cosine_window_attention: qkv must be (B, *grid, 3, H, D)");
  STD_TORCH_CHECK(int64_t(window.size()) == axes && int64_t(shift.size()) == axes,
                  "cosine_window_attention: window and shift must have one value per axis of the grid");
  Problem p;
  p.batch = qkv.size(0);
  p.heads = int(qkv.size(axes + 2));
  p.width = int(qkv.size(axes + 3));
  p.mask_value = float(mask_value);
  STD_TORCH_CHECK(p.width >= 8 && p.width <= MAX_WIDTH && p.width % 8 == 0,
                  "cosine_window_attention: head width must be 8 … 128 in steps of 8, got ", p.width);
  if (axes == 2) p.grid[0] = p.window[0] = 1, p.shift[0] = 0;
  STD_TORCH_CHECK(bias_table.dim() == axes + 1 && bias_table.size(0) == p.heads && logit_scale.dim() == 1 &&
                      logit_scale.size(0) == p.heads,
                  "cosine_window_attention: logit_scale and bias_table must have one entry per head");
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t axis = AXES - axes + i, size = qkv.size(1 + i), w = window[i], s = shift[i];
    STD_TORCH_CHECK(w >= 1 && w <= MAX_WINDOW && s >= 0 && s < w,
                    "cosine_window_attention: window must be 1 … 64 and shift 0 … window - 1, got ", w, " and ", s);
    STD_TORCH_CHECK(size < (int64_t(1) << 30), "cosine_window_attention: grid too large");
    STD_TORCH_CHECK(bias_table.size(1 + i) == 2 * w - 1, "cosine_window_attention: bias_table must have 2·window - 1 per axis");
    p.grid[axis] = int(size), p.window[axis] = int(w), p.shift[axis] = int(s);
  }
  check_rows(qkv, "qkv", qkv);
  check(logit_scale, "logit_scale", ScalarType::Float, qkv);
  check(bias_table, "bias_table", ScalarType::Float, qkv);
  return p;
}

gpu::Stream current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<gpu::Stream>(stream);
}

const float* numbers(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* numbers(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::vector<int64_t> map_shape(const Tensor& qkv) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < qkv.dim() - 3; ++i) shape.push_back(qkv.size(i));
  return shape;
}

std::tuple<Tensor, Tensor> forward_op(const Tensor qkv, const Tensor logit_scale, const Tensor bias_table,
                                      const std::vector<int64_t> window, const std::vector<int64_t> shift, double mask_value) {
  const Problem p = problem_of(qkv, logit_scale, bias_table, window, shift, mask_value);
  const Type type = type_of(qkv);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  std::vector<int64_t> shape = map_shape(qkv);
  shape.push_back(int64_t(p.heads) * p.width);
  Tensor out = torch::stable::new_empty(qkv, shape);
  shape.back() = p.heads;
  Tensor lse = torch::stable::new_empty(qkv, shape, ScalarType::Float);
  if (p.batch > 0 && p.map_tokens() > 0) {
    launchers_for(p, type).forward(p, qkv.const_data_ptr(), numbers(logit_scale), numbers(bias_table), out.mutable_data_ptr(),
                                   numbers(lse), current_stream(qkv));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor grad_out, const Tensor qkv, const Tensor logit_scale,
                                               const Tensor bias_table, const Tensor out, const Tensor lse,
                                               const std::vector<int64_t> window, const std::vector<int64_t> shift,
                                               double mask_value) {
  const Problem p = problem_of(qkv, logit_scale, bias_table, window, shift, mask_value);
  const Type type = type_of(qkv);
  const int64_t tokens = p.batch * p.map_tokens();
  check_rows(grad_out, "grad_out", qkv);
  check_rows(out, "out", qkv);
  check(lse, "lse", ScalarType::Float, qkv);
  STD_TORCH_CHECK(out.numel() == tokens * p.heads * p.width && grad_out.numel() == out.numel() && lse.numel() == tokens * p.heads,
                  "cosine_window_attention: grad_out, out and lse must be as forward returned them");
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  Tensor grad_logit_scale = torch::stable::new_zeros(logit_scale, {p.heads});
  Tensor grad_bias_table = torch::stable::empty_like(bias_table);
  if (tokens == 0) {
    torch::stable::zero_(grad_bias_table);
    return {grad_qkv, grad_logit_scale, grad_bias_table};
  }
  Tensor scratch = torch::stable::new_empty(logit_scale, {backward_scratch(p)});
  launchers_for(p, type).backward(p, grad_out.const_data_ptr(), qkv.const_data_ptr(), numbers(logit_scale), numbers(bias_table),
                                  out.const_data_ptr(), numbers(lse), grad_qkv.mutable_data_ptr(), numbers(grad_logit_scale),
                                  numbers(grad_bias_table), numbers(scratch), current_stream(qkv));
  return {grad_qkv, grad_logit_scale, grad_bias_table};
}

}  // namespace
}  // namespace cosine_window_attention::cuda

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CUDA, m) {
  m.impl("cosine_window_attention_forward", TORCH_BOX(&cosine_window_attention::cuda::forward_op));
  m.impl("cosine_window_attention_backward", TORCH_BOX(&cosine_window_attention::cuda::backward_op));
}
