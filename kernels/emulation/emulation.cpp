// The CUDA kernels under emulation as a library with plain C functions, for tests that call it through ctypes.
//   g++ -std=c++17 -O2 -shared -fPIC -DCOSINE_WINDOW_ATTENTION_EMULATE emulation.cpp -o libemulation.so -lpthread

// One translation unit, so that a test can hand in an altered copy of the kernels.
#if !defined(KERNELS)
#define KERNELS "../cosine_window_attention_cuda.cu"
#endif
#include KERNELS

#include "library.h"

namespace cwa = cosine_window_attention;

extern "C" {

// sizes: batch, grid, window, shift (three each), heads, width
static cwa::Problem problem_of(const int64_t* sizes, float mask_value) {
  cwa::Problem p;
  p.batch = sizes[0];
  for (int axis = 0; axis < 3; ++axis) {
    p.grid[axis] = int(sizes[1 + axis]);
    p.window[axis] = int(sizes[4 + axis]);
    p.shift[axis] = int(sizes[7 + axis]);
  }
  p.heads = int(sizes[10]);
  p.width = int(sizes[11]);
  p.mask_value = mask_value;
  return p;
}

int64_t emulation_scratch(const int64_t* sizes) { return cwa::cuda::backward_scratch(problem_of(sizes, 0.0f)); }

int emulation_forward(const int64_t* sizes, float mask_value, int type, const void* qkv, const float* logit_scale,
                      const float* bias_table, void* out, float* lse) {
  return guarded([&] {
    const cwa::Problem p = problem_of(sizes, mask_value);
    cwa::cuda::launchers_for(p, cwa::cuda::Type(type)).forward(p, qkv, logit_scale, bias_table, out, lse, nullptr);
  });
}

int emulation_backward(const int64_t* sizes, float mask_value, int type, const void* grad_out, const void* qkv,
                       const float* logit_scale, const float* bias_table, const void* out, const float* lse, void* grad_qkv,
                       float* grad_logit_scale, float* grad_bias_table, float* scratch) {
  return guarded([&] {
    const cwa::Problem p = problem_of(sizes, mask_value);
    cwa::cuda::launchers_for(p, cwa::cuda::Type(type))
        .backward(p, grad_out, qkv, logit_scale, bias_table, out, lse, grad_qkv, grad_logit_scale, grad_bias_table, scratch, nullptr);
  });
}
}
