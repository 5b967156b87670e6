// The parts of a block as PyTorch sees them, on any device; what does the work: bindings_block.cpp, bindings_block_cuda.cu.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "block.h"

namespace swinv2_block {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType exact_type(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What the operators are on a Device, which has
//   NAME
//   NORM_ALONE                       whether its norm takes no x, for a norm without residual sum
//   holds(tensor)                    of tensors that it can work on, given the map that is
//   prepared(tensor)                 the same numbers where its kernels can read them
//   check_order(images)              that they are an order of images, where their values can be looked at
//   norm_chunks(rows), map_chunks(rows, channels)
//   norm_forward(map, call) …        the work; what has partials adds them up in a tensor `total`
template <class Device>
struct Operators {
  static void check(const char* name, const Tensor& tensor, const Tensor& map, ScalarType type, int64_t count) {
    STD_TORCH_CHECK(Device::holds(tensor, map) && tensor.is_contiguous(), name, " must be contiguous and on the ", Device::NAME);
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong type");
    STD_TORCH_CHECK(tensor.numel() == count, name, " has ", tensor.numel(), " elements, not ", count);
  }

  static int channels_of(const Tensor& map) {
    STD_TORCH_CHECK(map.dim() >= 1 && map.size(map.dim() - 1) > 0 && map.size(map.dim() - 1) % 16 == 0,
                    "a map must have a multiple of 16 channels");
    check("a map", map, map, map.scalar_type(), map.numel());
    return int(map.size(map.dim() - 1));
  }

  // images: an order of those of `whole`, which are x's: those that y has, and then the others; not said: y has all.
  static NormCall image_call(const char* name, const Tensor& whole, const Tensor& y, const std::optional<Tensor>& images) {
    NormCall call{};
    call.channels = channels_of(y);
    call.rows = y.numel() / call.channels, call.all_rows = whole.numel() / call.channels;
    const Tensor& counted = images ? whole : y;
    call.rows_per_image = counted.dim() > 1 && counted.size(0) > 0 ? counted.numel() / call.channels / counted.size(0) : 1;
    check(name, whole, y, y.scalar_type(), images ? whole.numel() : y.numel());
    if (images) {
      check("images", *images, y, ScalarType::Long, whole.size(0)), Device::check_order(*images);
      const bool some = call.rows <= call.all_rows && call.rows == y.size(0) * call.rows_per_image;
      STD_TORCH_CHECK(some && channels_of(whole) == call.channels, "y must have some of the images of ", name);
      call.images = static_cast<const int64_t*>(images->const_data_ptr());
    }
    return call;
  }

  static NormCall norm_call(const char* name, const Tensor& whole, const Tensor& y, const Tensor& weight,
                            const std::optional<Tensor>& keep, const std::optional<Tensor>& images) {
    NormCall call = image_call(name, whole, y, images);
    call.chunks = Device::norm_chunks(call.rows);
    check("weight", weight, y, exact_type(y), call.channels);
    if (keep) check("keep", *keep, y, exact_type(y), y.size(0)), call.keep = keep->data_ptr();
    return call;
  }

  static std::tuple<Tensor, Tensor> norm_forward(std::optional<Tensor> x, Tensor y, Tensor weight, Tensor bias,
                                                 std::optional<Tensor> keep, std::optional<Tensor> images, double eps) {
    STD_TORCH_CHECK(x || (Device::NORM_ALONE && !images), "x must be given on the ", Device::NAME);
    NormCall call = norm_call("x", x ? *x : y, y, weight, keep, images);
    if (x) x = Device::prepared(*x);
    check("bias", bias, y, exact_type(y), call.channels);
    y = Device::prepared(y), weight = Device::prepared(weight), bias = Device::prepared(bias);
    Tensor out = torch::stable::empty_like(x ? *x : y);
    Tensor statistics = torch::stable::new_empty(weight, {call.rows, 2});
    call.eps = eps, call.x = x ? x->data_ptr() : nullptr, call.y = y.data_ptr(), call.weight = weight.data_ptr(), call.bias = bias.data_ptr();
    call.out = out.data_ptr(), call.statistics = statistics.data_ptr();
    Device::norm_forward(y, call);
    return {out, statistics};
  }

  static std::tuple<Tensor, Tensor> norm_backward(Tensor grad_out, Tensor y, Tensor weight, std::optional<Tensor> keep,
                                                  std::optional<Tensor> images, Tensor statistics) {
    NormCall call = norm_call("grad_out", grad_out, y, weight, keep, images);
    check("statistics", statistics, y, exact_type(y), 2 * call.rows);
    grad_out = Device::prepared(grad_out), y = Device::prepared(y), weight = Device::prepared(weight);
    Tensor grad_y = torch::stable::empty_like(y);
    Tensor partials = torch::stable::new_empty(weight, {call.chunks, 2, call.channels});
    Tensor total = torch::stable::new_empty(weight, {2, call.channels});
    call.grad_out = grad_out.data_ptr(), call.y = y.data_ptr(), call.weight = weight.data_ptr();
    call.statistics = statistics.data_ptr(), call.grad_y = grad_y.data_ptr(), call.partials = partials.data_ptr();
    Device::norm_backward(y, call, partials, total);
    return {grad_y, total};
  }

  // x, plus y for the first of `images` that it has.
  static Tensor add_images(Tensor x, Tensor y, Tensor images) {
    NormCall call = image_call("x", x, y, images);
    x = Device::prepared(x), y = Device::prepared(y);
    Tensor out = torch::stable::empty_like(x);
    call.x = x.data_ptr(), call.y = y.data_ptr(), call.out = out.data_ptr();
    Device::add_images(x, call);
    return out;
  }

  static MapCall map_call(Tensor& input) {
    MapCall call{};
    call.channels = channels_of(input);
    call.rows = input.numel() / call.channels;
    call.chunks = Device::map_chunks(call.rows, call.channels);
    input = Device::prepared(input);
    call.input = input.data_ptr();
    return call;
  }

  static Tensor gelu_forward(Tensor input) {
    MapCall call = map_call(input);
    Tensor out = torch::stable::empty_like(input);
    call.out = out.data_ptr();
    Device::gelu_forward(input, call);
    return out;
  }

  static std::tuple<Tensor, Tensor> gelu_backward(Tensor grad, Tensor input) {
    MapCall call = map_call(input);
    check("grad", grad, input, input.scalar_type(), input.numel());
    Tensor out = torch::stable::empty_like(input);
    Tensor partials = torch::stable::new_empty(input, {call.chunks, call.channels}, exact_type(input));
    Tensor total = torch::stable::new_empty(partials, {call.channels});
    call.grad = grad.data_ptr(), call.out = out.data_ptr(), call.partials = partials.data_ptr();
    Device::gelu_backward(input, call, partials, total);
    return {out, total};
  }

  static Tensor sum_rows(Tensor input) {
    MapCall call = map_call(input);
    Tensor partials = torch::stable::new_empty(input, {call.chunks, call.channels}, exact_type(input));
    Tensor total = torch::stable::new_empty(partials, {call.channels});
    call.partials = partials.data_ptr();
    Device::sum_rows(input, call, partials, total);
    return total;
  }

  static void implement(auto& library) {
    library.impl("residual_norm_forward", TORCH_BOX(&norm_forward));
    library.impl("residual_norm_backward", TORCH_BOX(&norm_backward));
    library.impl("add_images", TORCH_BOX(&add_images));
    library.impl("gelu_forward", TORCH_BOX(&gelu_forward));
    library.impl("gelu_backward", TORCH_BOX(&gelu_backward));
    library.impl("sum_rows", TORCH_BOX(&sum_rows));
  }
};

}  // namespace swinv2_block
