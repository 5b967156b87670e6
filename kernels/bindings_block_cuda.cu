// The parts of a block on a GPU; see block_cuda.cu.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "bindings_block.h"
#include "block_cuda.h"

namespace swinv2_block {
namespace {

struct Cuda {
  static constexpr const char* NAME = "device of the map";
  static constexpr bool NORM_ALONE = false;

  static bool holds(const Tensor& tensor, const Tensor& map) {
    return tensor.is_cuda() && tensor.get_device_index() == map.get_device_index();
  }
  // A copy of what is not aligned, such as a weight inside of a flat buffer.
  static Tensor prepared(const Tensor& tensor) { return is_aligned(tensor) ? tensor : torch::stable::clone(tensor); }
  static bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

  static void check_order(const Tensor&) {}  // it would have to be waited for

  static int64_t norm_chunks(int64_t rows) { return cuda::norm_chunks(rows); }
  static int64_t map_chunks(int64_t rows, int channels) { return cuda::map_chunks(rows, channels); }

  // Calls work(launchers, stream) with the map's device the current one.
  static void run(const Tensor& map, auto work) {
    cuda::Type type = cuda::Type::float32;
    switch (map.scalar_type()) {
      case ScalarType::Float: break;
      case ScalarType::BFloat16: type = cuda::Type::bfloat16; break;
      case ScalarType::Half: type = cuda::Type::float16; break;
      default: STD_TORCH_CHECK(false, "a map must be float32, bfloat16 or float16 on CUDA");
    }
    const torch::stable::accelerator::DeviceGuard guard(map.get_device_index());
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(map.get_device_index(), &stream));
    work(cuda::launchers_for(type), static_cast<cuda::gpu::Stream>(stream));
  }

  static void norm_forward(const Tensor& y, const NormCall& call) {
    run(y, [&](const cuda::Launchers& kernels, auto stream) { kernels.norm_forward(call, stream); });
  }
  static void norm_backward(const Tensor& y, const NormCall& call, const Tensor&, Tensor& total) {
    run(y, [&](const cuda::Launchers& kernels, auto stream) { kernels.norm_backward(call, numbers(total), stream); });
  }
  static void add_images(const Tensor& x, const NormCall& call) {
    run(x, [&](const cuda::Launchers& kernels, auto stream) { kernels.add_images(call, stream); });
  }
  static void gelu_forward(const Tensor& input, const MapCall& call) {
    run(input, [&](const cuda::Launchers& kernels, auto stream) { kernels.gelu_forward(call, stream); });
  }
  static void gelu_backward(const Tensor& input, const MapCall& call, const Tensor&, Tensor& total) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(call.grad) % 16 == 0, "grad, which is written, must be aligned to 16 bytes");
    run(input, [&](const cuda::Launchers& kernels, auto stream) { kernels.gelu_backward(call, numbers(total), stream); });
  }
  static void sum_rows(const Tensor& input, const MapCall& call, const Tensor&, Tensor& total) {
    run(input, [&](const cuda::Launchers& kernels, auto stream) { kernels.sum_rows(call, numbers(total), stream); });
  }
  static float* numbers(Tensor& total) { return static_cast<float*>(total.mutable_data_ptr()); }
};

}  // namespace
}  // namespace swinv2_block

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CUDA, m) { swinv2_block::Operators<swinv2_block::Cuda>::implement(m); }
