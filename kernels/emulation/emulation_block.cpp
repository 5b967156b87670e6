// A block's CUDA kernels under emulation as a library with plain C functions, as emulation.cpp is for the attention.

#if !defined(KERNELS)
#define KERNELS "../block_cuda.cu"
#endif
#include KERNELS

#include "library.h"

namespace sb = swinv2_block;

namespace {

sb::cuda::Launchers launchers(int type) { return sb::cuda::launchers_for(sb::cuda::Type(type)); }

// sizes: rows, channels; partials are those of emulation_map_chunks
sb::MapCall map_call(const int64_t* sizes, const void* input, void* grad, void* out, void* partials) {
  sb::MapCall call{};
  call.rows = sizes[0], call.channels = int(sizes[1]), call.chunks = sb::cuda::map_chunks(call.rows, call.channels);
  call.input = input, call.grad = grad, call.out = out, call.partials = partials;
  return call;
}

}  // namespace

extern "C" {

int64_t emulation_norm_chunks(int64_t rows) { return sb::cuda::norm_chunks(rows); }
int64_t emulation_map_chunks(int64_t rows, int64_t channels) { return sb::cuda::map_chunks(rows, int(channels)); }

// sizes: rows, channels, rows of an image, rows of x
int emulation_norm_forward(const int64_t* sizes, int type, const void* x, const void* y, const void* weight, const void* bias,
                           const void* keep, const int64_t* images, float eps, void* out, void* statistics) {
  return guarded([&] {
    sb::NormCall call{};
    call.rows = sizes[0], call.channels = int(sizes[1]), call.rows_per_image = sizes[2], call.eps = eps;
    call.all_rows = sizes[3], call.images = images;
    call.x = x, call.y = y, call.weight = weight, call.bias = bias, call.keep = keep;
    call.out = out, call.statistics = statistics;
    launchers(type).norm_forward(call, nullptr);
  });
}

int emulation_norm_backward(const int64_t* sizes, int type, const void* grad_out, const void* y, const void* weight,
                            const void* keep, const int64_t* images, void* statistics, void* grad_y, void* partials,
                            float* total) {
  return guarded([&] {
    sb::NormCall call{};
    call.rows = sizes[0], call.channels = int(sizes[1]), call.rows_per_image = sizes[2];
    call.all_rows = sizes[3], call.images = images, call.chunks = sb::cuda::norm_chunks(call.rows);
    call.grad_out = grad_out, call.y = y, call.weight = weight, call.keep = keep, call.statistics = statistics;
    call.grad_y = grad_y, call.partials = partials;
    launchers(type).norm_backward(call, total, nullptr);
  });
}

int emulation_add_images(const int64_t* sizes, int type, const void* x, const void* y, const int64_t* images, void* out) {
  return guarded([&] {
    sb::NormCall call{};
    call.rows = sizes[0], call.channels = int(sizes[1]), call.rows_per_image = sizes[2], call.all_rows = sizes[3];
    call.x = x, call.y = y, call.images = images, call.out = out;
    launchers(type).add_images(call, nullptr);
  });
}

int emulation_gelu_forward(const int64_t* sizes, int type, const void* input, void* out) {
  return guarded([&] { launchers(type).gelu_forward(map_call(sizes, input, nullptr, out, nullptr), nullptr); });
}

int emulation_gelu_backward(const int64_t* sizes, int type, void* grad, const void* input, void* out, void* partials,
                            float* total) {
  return guarded([&] { launchers(type).gelu_backward(map_call(sizes, input, grad, out, partials), total, nullptr); });
}

int emulation_sum_rows(const int64_t* sizes, int type, const void* input, void* partials, float* total) {
  return guarded([&] { launchers(type).sum_rows(map_call(sizes, input, nullptr, nullptr, partials), total, nullptr); });
}
}
