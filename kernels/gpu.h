// The instructions that only a GPU has, each in a thin wrapper. Nothing else of the CUDA kernels depends on the machine: with
// COSINE_WINDOW_ATTENTION_EMULATE the same names come from emulation/gpu.h, which runs every thread on the host.

#pragma once

#include <cstdint>

namespace cosine_window_attention::gpu {

using float32 = float;
// Storage of the two 16-bit types; arithmetic is float32, through pack and unpack.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

}  // namespace cosine_window_attention::gpu

#if defined(COSINE_WINDOW_ATTENTION_EMULATE)
#include "emulation/gpu.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cosine_window_attention::gpu {

using Stream = cudaStream_t;

// -- conversions ---------------------------------------------------------------------------------------------------------

// Two numbers, rounded to nearest even, in one register: `low` in the lower half, which is the lower address.
// Turing has no bfloat16: for it setup.py leaves that type out, and `launchers_for` refuses it.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<float16>(float low, float high) {
  uint16_t a, b;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
  return uint32_t(a) | uint32_t(b) << 16;
}
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both);

template <>
__device__ __forceinline__ float2 unpack<float16>(uint32_t both) {
  float2 x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x.x) : "h"(uint16_t(both)));
  asm("cvt.f32.f16 %0, %1;" : "=f"(x.y) : "h"(uint16_t(both >> 16)));
  return x;
}
template <>
__device__ __forceinline__ float2 unpack<bfloat16>(uint32_t both) {
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}

// e^x by the special function unit: two units in the last place where |x| is small, as it is for what matters in a softmax.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
// 1 / x by the same unit, for x up to 2^126: one unit in the last place.
__device__ __forceinline__ float fast_reciprocal(float x) { return __fdividef(1.0f, x); }

// -- shuffles ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// -- matrices ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit numbers; lane 8·i + r gives the address of row r of matrix i. Register i of lane l then holds
// elements 2·(l % 4) and the next of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same with every matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16x8, float32) += a (16x16) · b (16x8). With g = lane / 4 and t = lane % 4 a lane holds of c the elements
// (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); of a the pairs at (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8); and of b the
// pairs down the columns at (2t, g) and (2t+8, g).
template <typename T>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_accumulate<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                             uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing multiplies half as deep; the halves of the deep fragments are its fragments
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
template <>
__device__ __forceinline__ void multiply_accumulate<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                              uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -- asynchronous copies -------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, or 16 zero bytes where the source does not exist. The data may be read by the thread
// itself after `wait_for_copies`, by others after a barrier that follows it.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
#else
  *static_cast<int4*>(shared) = exists ? *static_cast<const int4*>(global) : int4{0, 0, 0, 0};
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// -- memory and launches -------------------------------------------------------------------------------------------------

// Hands out arrays of the block's dynamic shared memory, one after the other, each aligned to 16 bytes.
class SharedMemory {
 public:
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
    next_ = dynamic_shared_memory;
  }
  template <typename T>
  __device__ __forceinline__ T* take(int count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * int(sizeof(T)) + 15) / 16 * 16;
    return array;
  }

 private:
  unsigned char* next_;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that one block may have on the current device.
inline int shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of the device");
  return bytes;
}

inline bool has_bfloat16() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "compute capability of the device");
  return major >= 8;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Stream stream,
            Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "shared memory of a kernel");
  }
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), "launch of a kernel");
}

}  // namespace cosine_window_attention::gpu

#endif
