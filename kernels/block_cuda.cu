// What a block does besides its matrix products and its attention, on a GPU: the operators of block_cpu.cpp, where each is
// explained. All of it is bound by memory: each map is read and written once, 16 bytes at a time; arithmetic is float32.
//
//   norm_forward, norm_backward   a row stays in the registers of its lanes, which are a power of two: of several rows in a
//                                 warp, or of up to a whole block
//   gelu_forward, add_images      a thread takes 16 bytes
//   gelu_backward, sum_rows       a thread keeps its columns and walks down the rows, adding up
//   total                         adds the blocks' partial sums
//
// No sum depends on which thread comes first: rows of a block are added in their order, blocks in theirs. This file is
// compiled once per type, with -DELEMENT=float32, bfloat16 or float16; without ELEMENT it is all three.
// Lines that end in a [mark] are altered, one at a time, by the tests of the tests (tests/numerics/test_block_cuda.py).

#include "block_cuda.h"

#include <cmath>

#include "chunks.h"
#include "normal_tail.h"

namespace swinv2_block::cuda {
namespace {

using gpu::load_chunk;
using gpu::SharedMemory;
using gpu::store_chunk;

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
constexpr int TOTAL_ENTRIES = 8, TOTAL_LANES = THREADS / TOTAL_ENTRIES;  // 8 numbers are what memory reads at least
constexpr int64_t FORWARD_BLOCKS = 1 << 14;

template <typename T>
constexpr int CHUNK = 16 / int(sizeof(T));  // numbers that are loaded at once
// Chunks that a lane has of a row at most, 16 numbers: two blocks on a multiprocessor have registers for no more.
template <typename T>
constexpr int MOST_CHUNKS = 16 / CHUNK<T>;

// -- sums of a block -----------------------------------------------------------------------------------------------------

// The sum over the lanes of a row, for each of them; all threads of the block take part. Lanes of several warps meet in
// shared memory, in two places by turns: whoever writes to one has met all others since they read it.
class RowSum {
 public:
  __device__ __forceinline__ RowSum(SharedMemory& shared, int lanes) : sums_(shared.take<float>(2 * WARPS)), lanes_(lanes) {}

  __device__ __forceinline__ float operator()(float x) {
    for (int apart = 1; apart < lanes_ && apart < WARP; apart *= 2) x += gpu::shuffle_xor(x, apart);
    if (lanes_ <= WARP) return x;
    const int warp = threadIdx.x / WARP, warps = lanes_ / WARP, first = warp / warps * warps;
    place_ = WARPS - place_;  // [by turns]
    if (threadIdx.x % WARP == 0) sums_[place_ + warp] = x;
    __syncthreads();  // [barrier: row sum]
    x = sums_[place_ + first];
    for (int i = 1; i < warps; ++i) x += sums_[place_ + first + i];
    return x;
  }

 private:
  float* sums_;
  int lanes_, place_ = 0;
};

// What threads have for their chunk of columns, added up over the rows of the block, for the first `count` columns.
template <int Chunk>
__device__ __forceinline__ void add_rows(float* shared, const float (&x)[Chunk], int lanes, int count, float* total) {
  __syncthreads();  // [barrier: rows read]
#pragma unroll
  for (int j = 0; j < Chunk; ++j) shared[threadIdx.x * Chunk + j] = x[j];
  __syncthreads();  // [barrier: rows written]
  const int columns = lanes * Chunk;
  for (int column = threadIdx.x; column < columns && column < count; column += THREADS) {
    float sum = 0.0f;
    for (int row = 0; row < THREADS / lanes; ++row) sum += shared[row * columns + column];
    total[column] = sum;
  }
}

// -- residual post-norm --------------------------------------------------------------------------------------------------

// Loads as many columns of a row of a map, or of weights, as x has, a chunk or two; zeros where there are no such channels.
template <int Count, typename From>
__device__ __forceinline__ void load_columns(float (&x)[Count], const From* row, int column, int channels) {
#pragma unroll
  for (int j = 0; j < Count; ++j) x[j] = 0.0f;
  if (column < channels) {  // [columns]
#pragma unroll
    for (int j = 0; j < Count; j += CHUNK<From>) load_chunk(&x[j], row + column + j);
  }
}
template <typename T, int Each>
__device__ __forceinline__ void load_row(float (&x)[Each][CHUNK<T>], const T* row, int lane, int lanes, int channels) {
#pragma unroll
  for (int i = 0; i < Each; ++i) load_columns(x[i], row, (i * lanes + lane) * CHUNK<T>, channels);
}
template <typename T, int Each>
__device__ __forceinline__ void store_row(T* row, const float (&x)[Each][CHUNK<T>], int lane, int lanes, int channels) {
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    const int column = (i * lanes + lane) * CHUNK<T>;
    if (column < channels) store_chunk(row + column, x[i]);
  }
}

__device__ __forceinline__ float keep_of(const NormCall& call, int row) {
  return call.keep ? static_cast<const float*>(call.keep)[row / int(call.rows_per_image)] : 1.0f;
}
// Where in x the row begins that a row of y belongs to; beyond the last of y, those of the images that y does not have.
__device__ __forceinline__ int64_t place(const NormCall& call, int row) {
  const int each = int(call.rows_per_image);
  return (call.images ? call.images[row / each] * each + row % each : int64_t(row)) * call.channels;
}

// A block takes as many rows at a time as its threads suffice for; rows beyond the last have no channels.
template <typename T, int Each>
__global__ void __launch_bounds__(THREADS, 2) norm_forward_kernel(const NormCall call, const int lanes) {
  SharedMemory shared;
  RowSum row_sum(shared, lanes);
  const int lane = threadIdx.x % lanes, rows = THREADS / lanes;
  for (int first = blockIdx.x * rows; first < int(call.all_rows); first += int(call.chunks) * rows) {
    const int row = first + threadIdx.x / lanes;
    const bool exists = row < call.all_rows, has_y = row < call.rows;
    const int64_t at = exists ? place(call, row) : 0;
    const int channels = exists ? call.channels : 0;
    float x[Each][CHUNK<T>], y[Each][CHUNK<T>];
    load_row<T>(y, static_cast<const T*>(call.y) + int64_t(row) * call.channels, lane, lanes, has_y ? channels : 0);
    load_row<T>(x, static_cast<const T*>(call.x) + at, lane, lanes, channels);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
#pragma unroll
      for (int j = 0; j < CHUNK<T>; ++j) sum += y[i][j];
    }
    const float mean = row_sum(sum) / float(call.channels);
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      if ((i * lanes + lane) * CHUNK<T> >= channels) continue;  // [squares]
#pragma unroll
      for (int j = 0; j < CHUNK<T>; ++j) squares = fmaf(y[i][j] - mean, y[i][j] - mean, squares);
    }
    const float over = 1.0f / sqrtf(row_sum(squares) / float(call.channels) + float(call.eps));
    if (!exists) continue;
    const float keep = has_y ? keep_of(call, row) : 0.0f;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      const int column = (i * lanes + lane) * CHUNK<T>;
      float weight[CHUNK<T>], bias[CHUNK<T>];
      load_columns(weight, static_cast<const float*>(call.weight), column, channels);
      load_columns(bias, static_cast<const float*>(call.bias), column, channels);
#pragma unroll
      for (int j = 0; j < CHUNK<T>; ++j) x[i][j] = fmaf(fmaf((y[i][j] - mean) * over, weight[j], bias[j]), keep, x[i][j]);
    }
    store_row<T>(static_cast<T*>(call.out) + at, x, lane, lanes, channels);
    if (lane == 0 && has_y) {
      float* statistics = static_cast<float*>(call.statistics) + 2 * int64_t(row);
      statistics[0] = mean, statistics[1] = over;
    }
  }
}

template <typename T, int Each>
__global__ void __launch_bounds__(THREADS, 2) norm_backward_kernel(const NormCall call, const int lanes) {
  SharedMemory shared;
  RowSum row_sum(shared, lanes);
  float* const columns = shared.take<float>(THREADS * CHUNK<T>);
  const int lane = threadIdx.x % lanes, rows = THREADS / lanes;
  float weight_grad[Each][CHUNK<T>] = {}, bias_grad[Each][CHUNK<T>] = {};
  for (int first = blockIdx.x * rows; first < int(call.rows); first += int(call.chunks) * rows) {
    const int row = first + threadIdx.x / lanes;
    const int64_t at = int64_t(row) * call.channels;
    const bool exists = row < call.rows;
    const int channels = exists ? call.channels : 0;  // [rows]
    float grad[Each][CHUNK<T>], y[Each][CHUNK<T>];
    load_row<T>(grad, static_cast<const T*>(call.grad_out) + (exists ? place(call, row) : 0), lane, lanes, channels);
    load_row<T>(y, static_cast<const T*>(call.y) + at, lane, lanes, channels);
    const float keep = exists ? keep_of(call, row) : 0.0f;
    const float mean = exists ? static_cast<const float*>(call.statistics)[2 * row] : 0.0f;
    const float over = exists ? static_cast<const float*>(call.statistics)[2 * int64_t(row) + 1] : 0.0f;
    float level = 0.0f, along = 0.0f;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      float weight[CHUNK<T>];
      load_columns(weight, static_cast<const float*>(call.weight), (i * lanes + lane) * CHUNK<T>, channels);
#pragma unroll
      for (int j = 0; j < CHUNK<T>; ++j) {  // where no channel is, the gradient is zero
        const float g = grad[i][j] * keep, normed = (y[i][j] - mean) * over, weighted = g * weight[j];
        weight_grad[i][j] = fmaf(g, normed, weight_grad[i][j]), bias_grad[i][j] += g;
        level += weighted, along = fmaf(weighted, normed, along);
        grad[i][j] = weighted, y[i][j] = normed;
      }
    }
    const float level_mean = row_sum(level) / float(call.channels), along_mean = row_sum(along) / float(call.channels);
#pragma unroll
    for (int i = 0; i < Each; ++i) {
#pragma unroll
      for (int j = 0; j < CHUNK<T>; ++j) grad[i][j] = (grad[i][j] - level_mean - y[i][j] * along_mean) * over;
    }
    store_row<T>(static_cast<T*>(call.grad_y) + at, grad, lane, lanes, channels);
  }
  float* const partials = static_cast<float*>(call.partials) + 2 * int64_t(blockIdx.x) * call.channels;
#pragma unroll
  for (int i = 0; i < Each; ++i) {
    const int column = i * lanes * CHUNK<T>, count = call.channels - column;
    add_rows(columns, weight_grad[i], lanes, count, partials + column);
    add_rows(columns, bias_grad[i], lanes, count, partials + call.channels + column);
  }
}

// out = x + y, of the images that y has.
template <typename T>
__global__ void __launch_bounds__(THREADS) add_images_kernel(const NormCall call) {
  const int64_t each = call.channels / CHUNK<T>, chunks = call.all_rows * each;
  for (int64_t chunk = int64_t(blockIdx.x) * THREADS + threadIdx.x; chunk < chunks; chunk += call.chunks * THREADS) {
    const int row = int(chunk / each);
    const int64_t at = place(call, row) + chunk % each * CHUNK<T>;
    float x[CHUNK<T>], y[CHUNK<T>] = {};
    load_chunk(x, static_cast<const T*>(call.x) + at);
    if (row < call.rows) load_chunk(y, static_cast<const T*>(call.y) + chunk * CHUNK<T>);  // [added]
#pragma unroll
    for (int j = 0; j < CHUNK<T>; ++j) x[j] += y[j];
    store_chunk(static_cast<T*>(call.out) + at, x);
  }
}

// -- GELU and sums over rows ---------------------------------------------------------------------------------------------

// The normal distribution at x: gelu(x) = x · below, its derivative below + x · density.
struct Normal {
  float below, density;
};
__device__ __forceinline__ Normal normal(float x) {
  const float bell = exp2f(x * x * -0.7213475204444817f);  // exp(-x²/2)
  const float u = gpu::fast_reciprocal(1.0f + normal_tail::SLOPE * fabsf(x));
  const float tail = 0.5f * u * normal_tail::polynomial(u) * bell;
  return {x < 0.0f ? tail : 1.0f - tail, bell * 0.3989422804014327f};
}

template <typename T>
__global__ void __launch_bounds__(THREADS) gelu_forward_kernel(const MapCall call) {
  const int64_t chunks = call.rows * call.channels / CHUNK<T>;
  for (int64_t chunk = int64_t(blockIdx.x) * THREADS + threadIdx.x; chunk < chunks; chunk += call.chunks * THREADS) {
    float x[CHUNK<T>];
    load_chunk(x, static_cast<const T*>(call.input) + chunk * CHUNK<T>);
#pragma unroll
    for (int j = 0; j < CHUNK<T>; ++j) x[j] *= normal(x[j]).below;
    store_chunk(static_cast<T*>(call.out) + chunk * CHUNK<T>, x);
  }
}

// Sums over rows: of the input, or of the gradient of GELU's input, which takes the place of that of its output, while
// GELU's output is computed again. A block has `lanes` chunks of columns, and every call.chunks-th batch of rows.
template <typename T, bool Gelu>
__global__ void __launch_bounds__(THREADS) sum_kernel(const MapCall call, const int lanes, const int groups) {
  SharedMemory shared;
  float* const columns = shared.take<float>(THREADS * CHUNK<T>);
  const int first = int(blockIdx.x % groups) * lanes * CHUNK<T>, column = first + int(threadIdx.x % lanes) * CHUNK<T>;
  const int64_t chunk = blockIdx.x / groups, rows = THREADS / lanes;
  float sums[CHUNK<T>] = {};
  if (column < call.channels) {  // [column group]
    for (int64_t row = chunk * rows + threadIdx.x / lanes; row < call.rows; row += call.chunks * rows) {
      const int64_t at = row * call.channels + column;
      float x[CHUNK<T>];
      load_chunk(x, static_cast<const T*>(call.input) + at);
      if constexpr (Gelu) {
        T* const grad = static_cast<T*>(call.grad) + at;
        float slope[CHUNK<T>];
        load_chunk(slope, grad);
#pragma unroll
        for (int j = 0; j < CHUNK<T>; ++j) {
          const Normal at_x = normal(x[j]);
          slope[j] *= fmaf(x[j], at_x.density, at_x.below);
          x[j] *= at_x.below;
          sums[j] += slope[j];
        }
        store_chunk(static_cast<T*>(call.out) + at, x);
        store_chunk(grad, slope);
      } else {
#pragma unroll
        for (int j = 0; j < CHUNK<T>; ++j) sums[j] += x[j];
      }
    }
  }
  add_rows(columns, sums, lanes, call.channels - first, static_cast<float*>(call.partials) + chunk * call.channels + first);
}

// Adds `chunks` rows of partial sums: a thread adds every TOTAL_LANES-th, and the block adds those sums in order.
__global__ void __launch_bounds__(THREADS) total_kernel(const float* partials, const int64_t chunks, const int count,
                                                        float* total) {
  SharedMemory shared;
  float* const sums = shared.take<float>(THREADS);
  const int lane = threadIdx.x / TOTAL_ENTRIES, entry = int(blockIdx.x) * TOTAL_ENTRIES + int(threadIdx.x % TOTAL_ENTRIES);
  float sum = 0.0f;
  if (entry < count) {
    for (int64_t chunk = lane; chunk < chunks; chunk += TOTAL_LANES) sum += partials[chunk * count + entry];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();  // [barrier: total]
  if (lane > 0 || entry >= count) return;
  for (int i = 1; i < TOTAL_LANES; ++i) sum += sums[threadIdx.x + i * TOTAL_ENTRIES];
  total[entry] = sum;
}

// -- launchers -----------------------------------------------------------------------------------------------------------

// The least power of two of lanes that have a row's chunks when each has `each`.
int lanes_for(int chunks, int each) {
  int lanes = 1;
  while (lanes * each < chunks) lanes *= 2;
  return lanes;
}

void launch_total(const void* partials, int64_t chunks, int count, float* total, gpu::Stream stream) {
  gpu::launch(&total_kernel, (count + TOTAL_ENTRIES - 1) / TOTAL_ENTRIES, THREADS, THREADS * 4, stream,
              static_cast<const float*>(partials), chunks, count, total);
}

template <typename T>
struct Launcher {
  static constexpr int chunk = CHUNK<T>, row_bytes = 2 * WARPS * 4, column_bytes = THREADS * chunk * 4;

  // Calls launch(kernel, lanes) with the kernel whose lanes have less of nothing to do.
  template <typename Kernel, typename Launch>
  static void choose_lanes(const NormCall& call, Kernel many, Kernel few, Launch launch) {
    constexpr int most = MOST_CHUNKS<T>;
    const int channels = call.channels;
    if (channels > MAX_NORM_CHANNELS) throw std::runtime_error("a norm may have at most 4096 channels");
    if (call.all_rows > MAX_NORM_ROWS) throw std::runtime_error("a norm may have at most 2^30 rows");
    const int lanes = lanes_for(channels / chunk, most), fewer = lanes_for(channels / chunk, most - 1);
    if (lanes * most <= fewer * (most - 1)) {
      launch(many, lanes);
    } else {
      launch(few, fewer);
    }
  }

  static void norm_forward(const NormCall& given, gpu::Stream stream) {
    NormCall call = given;
    if (call.all_rows == 0) return;
    choose_lanes(call, &norm_forward_kernel<T, MOST_CHUNKS<T>>, &norm_forward_kernel<T, MOST_CHUNKS<T> - 1>,
                 [&](auto kernel, int lanes) {
                   call.chunks = std::min((call.all_rows * lanes + THREADS - 1) / THREADS, FORWARD_BLOCKS);
                   gpu::launch(kernel, call.chunks, THREADS, row_bytes, stream, call, lanes);
                 });
  }

  static void norm_backward(const NormCall& call, float* total, gpu::Stream stream) {
    choose_lanes(call, &norm_backward_kernel<T, MOST_CHUNKS<T>>, &norm_backward_kernel<T, MOST_CHUNKS<T> - 1>,
                 [&](auto kernel, int lanes) {
                   gpu::launch(kernel, call.chunks, THREADS, row_bytes + column_bytes, stream, call, lanes);
                 });
    launch_total(call.partials, call.chunks, 2 * call.channels, total, stream);
  }

  static void add_images(const NormCall& given, gpu::Stream stream) {
    NormCall call = given;
    if (call.all_rows == 0) return;
    if (call.all_rows > MAX_NORM_ROWS) throw std::runtime_error("maps may have at most 2^30 rows");
    call.chunks = std::min((call.all_rows * call.channels / chunk + THREADS - 1) / THREADS, FORWARD_BLOCKS);
    gpu::launch(&add_images_kernel<T>, call.chunks, THREADS, 0, stream, call);
  }

  static void gelu_forward(const MapCall& given, gpu::Stream stream) {
    MapCall call = given;
    if (call.rows == 0) return;
    call.chunks = std::min((call.rows * call.channels / chunk + THREADS - 1) / THREADS, FORWARD_BLOCKS);
    gpu::launch(&gelu_forward_kernel<T>, call.chunks, THREADS, 0, stream, call);
  }

  template <bool Gelu>
  static void sum(const MapCall& call, float* total, gpu::Stream stream) {
    const int chunks = call.channels / chunk, lanes = std::min(lanes_for(chunks, 1), WARP);
    const int groups = (chunks + lanes - 1) / lanes;
    gpu::launch(&sum_kernel<T, Gelu>, call.chunks * groups, THREADS, column_bytes, stream, call, lanes, groups);
    launch_total(call.partials, call.chunks, call.channels, total, stream);
  }
};

}  // namespace

template <typename T>
Launchers launchers_of_type() {
  using L = Launcher<T>;
  return {&L::norm_forward, &L::norm_backward, &L::add_images, &L::gelu_forward, &L::template sum<true>, &L::template sum<false>};
}

#if defined(ELEMENT)
template Launchers launchers_of_type<gpu::ELEMENT>();
#else
template Launchers launchers_of_type<gpu::float32>();
template Launchers launchers_of_type<gpu::bfloat16>();
template Launchers launchers_of_type<gpu::float16>();
#endif

}  // namespace swinv2_block::cuda
