// Shifted-window cosine attention in CUDA C++: forward and backward, on tensor cores for 16-bit types.
//
// A block owns some consecutive rows of one window and one head, and walks over all columns of that window tile by tile:
//   forward            rows are queries, columns are keys; online softmax with the true running maximum
//   backward_queries   the same once more, for the gradients of q, of the bias table and of the scale
//   backward_keys      rows are keys, columns are queries, for the gradients of k and v
//   reduce             adds the blocks' partial gradients of table and scale, in a fixed order
// No sum depends on which thread comes first, so there are no atomics and two runs agree bit by bit. Tokens are found on the
// map by index (cosine_window_attention.h): nothing is padded, rolled, partitioned or expanded in memory.
//
// Every warp owns 16 rows. Its logits, probabilities and sums live in the layout of the tensor core's result: with
// g = lane / 4 and t = lane % 4 a lane has, of each 16x8 tile, columns 2t and 2t + 1 of rows g and g + 8 ("half" 0 and 1).
// float32 uses the same layout with ordinary arithmetic, so that only `multiply_*` below differ between types. This file is
// compiled once per type, with -DELEMENT=float32, bfloat16 or float16; without ELEMENT it is all three.
// Lines that end in a [mark] are altered, one at a time, by the tests of the tests (tests/numerics/test_cuda_emulation.py).

#include "cosine_window_attention_cuda.h"

#include <cmath>

#include "chunks.h"

namespace cosine_window_attention::cuda {
namespace {

using gpu::load_chunk;
using gpu::SharedMemory;
using gpu::store_chunk;

constexpr float INFINITE = INFINITY;
constexpr int ABSENT = -1;  // region of a token that does not exist
constexpr int REDUCE_ENTRIES = 32, REDUCE_LANES = 8;

// -- tiles ---------------------------------------------------------------------------------------------------------------

// Tile sizes, such that no kernel needs more than 64 KB beside the tables (all a Turing has) nor more than 255 registers.
// `Width` is the head width rounded up to 32, 64 or 128; the rest of a row is zero.
template <typename T, int Width>
struct Tiles {
  static constexpr int row_bytes = Width * int(sizeof(T));
  static constexpr int warps = row_bytes > 256 ? 2 : 4;
  static constexpr int threads = 32 * warps;
  static constexpr int rows = 16 * warps;
  static constexpr int forward_columns = row_bytes <= 128 ? 64 : 8192 / row_bytes;
  static constexpr int backward_columns = forward_columns / 2;
  // 16 bytes more than a row, so that the 8 rows of a matrix lie in different banks.
  static constexpr int stride = Width + 16 / int(sizeof(T));
  static constexpr int chunk = 16 / int(sizeof(T));  // elements that are copied at once
  static constexpr int chunks = Width / chunk;
  // One more than a row: the tile of logit gradients is read down its columns.
  static constexpr int gradient_stride = backward_columns + 1;
  // Blocks that a multiprocessor shall hold at least, which bounds registers from above; chosen so that nothing spills on any
  // architecture (tests/numerics/test_cuda_build.py). Left alone, the compiler spills a few words to fit one block more.
  static constexpr int blocks = row_bytes <= 64 ? 4 : 1;
};

constexpr int aligned(int bytes) { return (bytes + 15) / 16 * 16; }

template <typename T, int Width>
constexpr int forward_bytes() {
  using S = Tiles<T, Width>;
  return S::rows * S::stride * int(sizeof(T)) + 4 * S::forward_columns * S::stride * int(sizeof(T)) +
         2 * aligned(S::rows * 4) + 4 * aligned(S::forward_columns * 4);
}
template <typename T, int Width>
constexpr int backward_queries_bytes() {
  using S = Tiles<T, Width>;
  return 2 * S::rows * S::stride * int(sizeof(T)) + 4 * S::backward_columns * S::stride * int(sizeof(T)) +
         5 * aligned(S::rows * 4) + 4 * aligned(S::backward_columns * 4) + aligned(S::rows * S::gradient_stride * 4) +
         aligned(S::threads * 4);
}
template <typename T, int Width>
constexpr int backward_keys_bytes() {
  using S = Tiles<T, Width>;
  return 2 * S::rows * S::stride * int(sizeof(T)) + 4 * S::backward_columns * S::stride * int(sizeof(T)) +
         3 * aligned(S::rows * 4) + 8 * aligned(S::backward_columns * 4);
}

// -- geometry ------------------------------------------------------------------------------------------------------------

// One window of one image, and the part of it that a block works on.
struct Part {
  int64_t image;
  Place window;
  int first_row, rows;  // rows that exist in the window, which absent tokens do
};

__device__ __forceinline__ Part part_of(const Problem& p, int64_t item, int tile_rows) {
  const int tiles = (p.tokens() + tile_rows - 1) / tile_rows;
  const int64_t window = item / tiles, windows = p.windows();
  const int first = int(item % tiles) * tile_rows;
  const int rest = p.tokens() - first;
  return {window / windows, p.window_place(window % windows), first, rest < tile_rows ? rest : tile_rows};  // [row count]
}

// What the logits of a pair depend on beside q and k. The entry of the bias table for a pair is
// code of query - code of key + p.offset_index(0, 0), as offset_index is linear.
struct Labels {
  int* code;
  int* region;
};

__device__ __forceinline__ void set_label(const Problem& p, const Part& part, Labels labels, int at, int token) {
  const bool inside = token < p.tokens();
  const Place place = p.token_place(inside ? token : 0);
  const bool exists = inside && p.token_index(0, part.window, place) >= 0;
  labels.code[at] = p.offset_index(place, Place{{0, 0, 0}});
  labels.region[at] = exists ? p.region(part.window, place) : ABSENT;
}

// Index among all tokens (B, *grid), -1 for a token that does not exist.
__device__ __forceinline__ int64_t token_at(const Problem& p, const Part& part, int token) {
  return token < p.tokens() ? p.token_index(part.image, part.window, p.token_place(token)) : -1;
}

// `bias` points at offset zero of the head's table.
__device__ __forceinline__ float logit(float cosine, float scale, const float* bias, int query_code, int key_code,
                                       int query_region, int key_region, float mask_value) {
  if (key_region == ABSENT) return -INFINITE;  // [absent]
  const float x = fmaf(cosine, scale, bias[query_code - key_code]);
  return query_region == key_region ? x : x + mask_value;
}

// exp(min(s, log 100)); a scale that is not a number stays one.
__device__ __forceinline__ float scale_of(float logit_scale) {
  return expf(logit_scale > float(MAX_LOGIT_SCALE) ? float(MAX_LOGIT_SCALE) : logit_scale);
}

template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return gpu::fast_exp(x);
}

// -- rows of a tensor ----------------------------------------------------------------------------------------------------

// Rows of q, k or v of one head, or of out: row i starts at first + i · step.
template <typename T>
struct Rows {
  T* first;
  int64_t step;
  __device__ __forceinline__ T* operator[](int64_t token) const { return first + token * step; }
};
template <typename T>
__device__ __forceinline__ Rows<T> part_rows(const Problem& p, T* qkv, int part, int head) {
  return {qkv + p.qkv_offset(0, part, head), p.qkv_offset(1, 0, 0)};
}
template <typename T>
__device__ __forceinline__ Rows<T> out_rows(const Problem& p, T* out, int head) {
  return {out + p.out_offset(0, head), p.out_offset(1, 0)};
}

template <typename T>
__device__ __forceinline__ float2 load_pair(const T* at) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float2*>(at);
  } else {
    return gpu::unpack<T>(*reinterpret_cast<const uint32_t*>(at));
  }
}
template <typename T>
__device__ __forceinline__ void store_pair(T* at, float x, float y) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(at) = float2{x, y};
  } else {
    *reinterpret_cast<uint32_t*>(at) = gpu::pack<T>(x, y);
  }
}
// Starts to copy `Count` rows of two tensors, from token `first` of the window on. Absent tokens and the rest of a row that
// is wider than the head become zero.
template <typename T, int Width, int Count>
__device__ __forceinline__ void copy_rows(const Problem& p, const Part& part, int first, T* tile_a, Rows<const T> a, T* tile_b,
                                          Rows<const T> b) {
  using S = Tiles<T, Width>;
#pragma unroll 1
  for (int at = threadIdx.x; at < Count * S::chunks; at += S::threads) {
    const int row = at / S::chunks, column = at % S::chunks * S::chunk;
    const int64_t token = token_at(p, part, first + row);
    const bool exists = token >= 0 && column < p.width;
    const int64_t from = exists ? token : 0, offset = exists ? column : 0;
    gpu::copy_async(tile_a + row * S::stride + column, a[from] + offset, exists);
    if (tile_b != nullptr) gpu::copy_async(tile_b + row * S::stride + column, b[from] + offset, exists);
  }
}

// Divides each row of a tile by its length, in place: `Count` rows by all threads of the block, several to a row.
// A length of zero counts as one, so that such a row stays zero. Keeps the lengths if asked.
template <typename T, int Width, int Count>
__device__ __forceinline__ void normalise(T* tile, float* lengths) {
  using S = Tiles<T, Width>;
  constexpr int share = S::threads / Count, each = S::chunks / share;
  static_assert(share * Count == S::threads && each * share == S::chunks && share <= 32);
  const int row = threadIdx.x / share, lane = threadIdx.x % share;
  float x[each][S::chunk], square = 0.0f;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    load_chunk(x[i], tile + row * S::stride + (i * share + lane) * S::chunk);
#pragma unroll
    for (int j = 0; j < S::chunk; ++j) square = fmaf(x[i][j], x[i][j], square);
  }
#pragma unroll
  for (int lanes = 1; lanes < share; lanes *= 2) square += gpu::shuffle_xor(square, lanes);
  const float length = sqrtf(square);
  const float divisor = length == 0.0f ? 1.0f : fmaxf(length, float(MIN_LENGTH));
  const float inverse = 1.0f / divisor;
#pragma unroll
  for (int i = 0; i < each; ++i) {
#pragma unroll
    for (int j = 0; j < S::chunk; ++j) x[i][j] = sizeof(T) == 4 ? x[i][j] / divisor : x[i][j] * inverse;
    store_chunk(tile + row * S::stride + (i * share + lane) * S::chunk, x[i]);
  }
  if (lengths != nullptr && lane == 0) lengths[row] = length;
}

// -- products of a warp --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float quad_sum(float x) {
  x += gpu::shuffle_xor(x, 1);
  return x + gpu::shuffle_xor(x, 2);
}
__device__ __forceinline__ float quad_maximum(float x) {
  x = fmaxf(x, gpu::shuffle_xor(x, 1));
  return fmaxf(x, gpu::shuffle_xor(x, 2));
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

// result (16, 8·N) = a (16, Width) · bᵀ, where b is (8·N, Width); both are tiles in shared memory.
template <typename T, int Width, int N>
__device__ __forceinline__ void multiply_transposed(float (&result)[N][4], const T* a, const T* b) {
  constexpr int stride = Tiles<T, Width>::stride;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n) result[n][0] = result[n][1] = result[n][2] = result[n][3] = 0.0f;
  if constexpr (sizeof(T) == 4) {
    a += lane / 4 * stride;
    b += lane % 4 * 2 * stride;
#pragma unroll 1
    for (int k = 0; k < Width; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(a + k);
      const float4 a1 = *reinterpret_cast<const float4*>(a + 8 * stride + k);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float4 b0 = *reinterpret_cast<const float4*>(b + 8 * n * stride + k);
        const float4 b1 = *reinterpret_cast<const float4*>(b + (8 * n + 1) * stride + k);
        result[n][0] = dot(a0, b0, result[n][0]);
        result[n][1] = dot(a0, b1, result[n][1]);
        result[n][2] = dot(a1, b0, result[n][2]);
        result[n][3] = dot(a1, b1, result[n][3]);
      }
    }
  } else {
    a += lane % 16 * stride + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;  // [matrix rows]
#pragma unroll 2  // all of it makes the compiler load fragments so early that they spill at width 128
    for (int k = 0; k < Width; k += 16) {
      uint32_t from_a[4], from_b[4];
      gpu::load_matrices(from_a, a + k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        gpu::load_matrices(from_b, b + 8 * n * stride + k);
        gpu::multiply_accumulate<T>(result[n], from_a, from_b[0], from_b[1]);
        gpu::multiply_accumulate<T>(result[n + 1], from_a, from_b[2], from_b[3]);
      }
    }
  }
}

// result (16, Width) += p (16, 8·N) · b, where b is a tile (8·N, Width) in shared memory and p lies in registers, in the
// layout of a result; 16-bit types round it.
template <typename T, int Width, int N>
__device__ __forceinline__ void multiply_add(float (&result)[Width / 8][4], const float (&p)[N][4], const T* b) {
  constexpr int stride = Tiles<T, Width>::stride;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int first = 0; first < 8 * N; first += 4) {
      float p0[4], p1[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // column k of p is with lane k / 2 % 4 of the four that share the rows
        const int owner = (lane & ~3) | ((first + k) / 2 % 4);
        p0[k] = gpu::shuffle(p[first / 8][k % 2], owner);
        p1[k] = gpu::shuffle(p[first / 8][2 + k % 2], owner);
      }
#pragma unroll
      for (int n = 0; n < Width / 8; ++n) {
        // The sum of four comes first, as thousands of keys in a row lose digits; at width 128 registers are too few.
        constexpr bool by_fours = Width <= 64;
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = by_fours ? 0.0f : result[n][i];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 pair = load_pair(b + (first + k) * stride + 8 * n + lane % 4 * 2);
          sum[0] = fmaf(p0[k], pair.x, sum[0]);
          sum[1] = fmaf(p0[k], pair.y, sum[1]);
          sum[2] = fmaf(p1[k], pair.x, sum[2]);
          sum[3] = fmaf(p1[k], pair.y, sum[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) result[n][i] = by_fours ? result[n][i] + sum[i] : sum[i];
      }
    }
  } else {
    b += lane % 16 * stride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N; k += 2) {  // two tiles of p side by side are one factor of 16x16
      const uint32_t from_p[4] = {gpu::pack<T>(p[k][0], p[k][1]), gpu::pack<T>(p[k][2], p[k][3]),
                                  gpu::pack<T>(p[k + 1][0], p[k + 1][1]), gpu::pack<T>(p[k + 1][2], p[k + 1][3])};  // [fragment]
#pragma unroll
      for (int n = 0; n < Width / 8; n += 2) {
        uint32_t from_b[4];
        gpu::load_matrices_transposed(from_b, b + 8 * k * stride + 8 * n);
        gpu::multiply_accumulate<T>(result[n], from_p, from_b[0], from_b[1]);
        gpu::multiply_accumulate<T>(result[n + 1], from_p, from_b[2], from_b[3]);
      }
    }
  }
}

template <int N>
__device__ __forceinline__ void set_zero(float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
}

// -- forward -------------------------------------------------------------------------------------------------------------

// The head's bias table, staged in shared memory if there is room; points at offset zero. A barrier must follow.
__device__ __forceinline__ const float* bias_of(const Problem& p, SharedMemory& shared, const float* bias_table, int head,
                                                bool stage, int threads) {
  const float* bias = bias_table + int64_t(head) * p.offsets();
  if (stage) {
    float* staged = shared.take<float>(p.offsets());
    for (int i = threadIdx.x; i < p.offsets(); i += threads) staged[i] = bias[i];
    bias = staged;
  }
  return bias + p.offset_index(Place{{0, 0, 0}}, Place{{0, 0, 0}});
}

template <typename T, int Width>
__global__ void __launch_bounds__(Tiles<T, Width>::threads, Tiles<T, Width>::blocks)
    forward_kernel(const Problem p, const T* qkv, const float* logit_scale, const float* bias_table, const bool stage_bias,
                   T* out, float* lse) {
  using S = Tiles<T, Width>;
  constexpr int COLUMNS = S::forward_columns, N = COLUMNS / 8;
  SharedMemory shared;
  T* q_tile = shared.take<T>(S::rows * S::stride);
  T* k_tiles[2] = {shared.take<T>(COLUMNS * S::stride), shared.take<T>(COLUMNS * S::stride)};
  T* v_tiles[2] = {shared.take<T>(COLUMNS * S::stride), shared.take<T>(COLUMNS * S::stride)};
  const Labels queries = {shared.take<int>(S::rows), shared.take<int>(S::rows)};
  const Labels keys0 = {shared.take<int>(COLUMNS), shared.take<int>(COLUMNS)};
  const Labels keys1 = {shared.take<int>(COLUMNS), shared.take<int>(COLUMNS)};

  const int head = blockIdx.x % p.heads;  // innermost: neighbours on the map's memory run at the same time
  const Part part = part_of(p, blockIdx.x / p.heads, S::rows);
  const float* bias = bias_of(p, shared, bias_table, head, stage_bias, S::threads);
  const float scale = scale_of(logit_scale[head]);
  const Rows<const T> q = part_rows(p, qkv, 0, head), k = part_rows(p, qkv, 1, head), v = part_rows(p, qkv, 2, head);

  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const bool busy = thread / 32 * 16 < part.rows;  // else no row of this warp exists, and it only helps to copy

  auto fetch = [&](int first, bool odd) {
    if (thread < COLUMNS) set_label(p, part, odd ? keys1 : keys0, thread, first + thread);
    copy_rows<T, Width, COLUMNS>(p, part, first, odd ? k_tiles[1] : k_tiles[0], k, odd ? v_tiles[1] : v_tiles[0], v);
  };

  if (thread < S::rows) set_label(p, part, queries, thread, part.first_row + thread);
  copy_rows<T, Width, S::rows>(p, part, part.first_row, q_tile, q, static_cast<T*>(nullptr), q);
  fetch(0, false);
  gpu::wait_for_copies();
  __syncthreads();  // [barrier: queries landed]
  normalise<T, Width, S::rows>(q_tile, nullptr);

  float sum[Width / 8][4], highest[2] = {-INFINITE, -INFINITE}, total[2] = {0.0f, 0.0f};
  set_zero(sum);
  bool odd = false;
#pragma unroll 1
  for (int first = 0; first < p.tokens(); first += COLUMNS, odd = !odd) {
    gpu::wait_for_copies();  // [wait]
    __syncthreads();  // [barrier: keys landed] and the other tile has been read
    if (first + COLUMNS < p.tokens()) fetch(first + COLUMNS, !odd);
    T* const k_tile = odd ? k_tiles[1] : k_tiles[0];
    normalise<T, Width, COLUMNS>(k_tile, nullptr);
    __syncthreads();  // [barrier: keys normalised]
    if (!busy) continue;
    const Labels keys = odd ? keys1 : keys0;

    float x[N][4];
    multiply_transposed<T, Width, N>(x, q_tile + thread / 32 * 16 * S::stride, k_tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int code = queries.code[row + 8 * half], region = queries.region[row + 8 * half];
      float maximum = highest[half];
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int c = 8 * n + column + i;
          float& element = x[n][2 * half + i];
          element = logit(element, scale, bias, code, keys.code[c], region, keys.region[c], p.mask_value);
          maximum = fmaxf(maximum, element);
        }
      }
      maximum = quad_maximum(maximum);
      const float finite = maximum == -INFINITE ? 0.0f : maximum;  // no key yet that this query may see
      const float correction = exponential<T>(highest[half] - finite);
      highest[half] = maximum;
      float tile_total = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& element = x[n][2 * half + i];
          element = exponential<T>(element - finite);
          tile_total += element;
        }
      }
      total[half] = total[half] * correction + tile_total;
#pragma unroll
      for (int n = 0; n < Width / 8; ++n) {
        sum[n][2 * half] *= correction;  // [correction]
        sum[n][2 * half + 1] *= correction;
      }
    }
    multiply_add<T, Width, N>(sum, x, odd ? v_tiles[1] : v_tiles[0]);
  }
  if (!busy) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float whole = quad_sum(total[half]);
    const int64_t token = token_at(p, part, part.first_row + row + 8 * half);
    if (token < 0) continue;
    if (column == 0) lse[p.row_offset(token, head)] = highest[half] + logf(whole);
    T* const to = out_rows(p, out, head)[token] + column;
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
      if (8 * n < p.width) store_pair(to + 8 * n, sum[n][2 * half] / whole, sum[n][2 * half + 1] / whole);
    }
  }
}

// -- backward ------------------------------------------------------------------------------------------------------------

// From the gradient of x / |x|, in registers, to that of x: its part along x vanishes. A length of zero is a constant
// divisor of one, and one below MIN_LENGTH a constant divisor as well.
template <typename T, int Width>
__device__ __forceinline__ void write_gradient_of_normalised(const Problem& p, const Part& part, float (&gradient)[Width / 8][4],
                                                             Rows<const T> x, Rows<T> to, const float* lengths) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = token_at(p, part, part.first_row + row + 8 * half);
    const T* const from = x[token < 0 ? 0 : token] + column;
    float along = 0.0f;
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
      if (token < 0 || 8 * n >= p.width) continue;
      const float2 pair = load_pair(from + 8 * n);
      along = fmaf(pair.x, gradient[n][2 * half], fmaf(pair.y, gradient[n][2 * half + 1], along));
    }
    along = quad_sum(along);
    if (token < 0) continue;
    const float length = lengths[row + 8 * half];
    const float divisor = length == 0.0f ? 1.0f : fmaxf(length, float(MIN_LENGTH));
    along = length >= float(MIN_LENGTH) ? along / divisor / divisor : 0.0f;
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
      if (8 * n >= p.width) continue;
      const float2 pair = load_pair(from + 8 * n);
      store_pair(to[token] + column + 8 * n, (gradient[n][2 * half] - pair.x * along) / divisor,
                 (gradient[n][2 * half + 1] - pair.y * along) / divisor);
    }
  }
}

// Adds the gradients of one tile's logits to those of the bias table (which points at offset zero). A thread owns the
// entries it adds to and gathers from the tile, so that nothing has to be atomic: for one offset, the row is the column plus a
// constant, and the pair has that offset exactly if the codes differ by it.
__device__ __forceinline__ void add_to_table(const Problem& p, float* table, const float* tile, int stride, const int* row_codes,
                                             int rows, int first_row, const int* column_codes, int columns, int first_column,
                                             int threads) {
  const int zero = p.offset_index(Place{{0, 0, 0}}, Place{{0, 0, 0}});
  const int last = row_codes[rows - 1] - column_codes[0];  // codes grow with the token
  for (int offset = row_codes[0] - column_codes[columns - 1] + threadIdx.x; offset <= last; offset += threads) {
    const int entry = offset + zero, width2 = 2 * p.window[2] - 1, width1 = 2 * p.window[1] - 1;
    const int d2 = entry % width2 - (p.window[2] - 1), d1 = entry / width2 % width1 - (p.window[1] - 1);
    const int d0 = entry / width2 / width1 - (p.window[0] - 1);
    const int shift = (d0 * p.window[1] + d1) * p.window[2] + d2 + first_column - first_row;
    const int begin = shift < 0 ? -shift : 0, end = columns < rows - shift ? columns : rows - shift;
    float sum = 0.0f;
    for (int column = begin; column < end; ++column) {
      const int row = column + shift;
      if (row_codes[row] - column_codes[column] == offset) sum += tile[row * stride + column];
    }
    table[offset] += sum;
  }
}

// Rows are queries. A block takes every `slots`-th part of the map, always the same ones in the same order, and leaves its sum
// for table and scale in its own row of `partials`.
template <typename T, int Width>
__global__ void __launch_bounds__(Tiles<T, Width>::threads, Tiles<T, Width>::blocks)
    backward_queries_kernel(const Problem p, const T* grad_out, const T* qkv, const float* logit_scale, const float* bias_table,
                            const bool stage_bias, const bool stage_gradient, const T* out, const float* lse, float* delta,
                            T* grad_qkv, float* partials, const int64_t items, const int slots) {
  using S = Tiles<T, Width>;
  constexpr int COLUMNS = S::backward_columns, N = COLUMNS / 8;
  SharedMemory shared;
  T* q_tile = shared.take<T>(S::rows * S::stride);
  T* grad_tile = shared.take<T>(S::rows * S::stride);
  T* k_tiles[2] = {shared.take<T>(COLUMNS * S::stride), shared.take<T>(COLUMNS * S::stride)};
  T* v_tiles[2] = {shared.take<T>(COLUMNS * S::stride), shared.take<T>(COLUMNS * S::stride)};
  const Labels queries = {shared.take<int>(S::rows), shared.take<int>(S::rows)};
  float* const lengths = shared.take<float>(S::rows);
  float* const lse_rows = shared.take<float>(S::rows);
  float* const delta_rows = shared.take<float>(S::rows);
  const Labels keys0 = {shared.take<int>(COLUMNS), shared.take<int>(COLUMNS)};
  const Labels keys1 = {shared.take<int>(COLUMNS), shared.take<int>(COLUMNS)};
  float* const gradient_tile = shared.take<float>(S::rows * S::gradient_stride);
  float* const scale_sums = shared.take<float>(S::threads);

  const int head = blockIdx.x % p.heads, slot = blockIdx.x / p.heads;
  const float* bias = bias_of(p, shared, bias_table, head, stage_bias, S::threads);
  const float scale = scale_of(logit_scale[head]);
  const Rows<const T> q = part_rows(p, qkv, 0, head), k = part_rows(p, qkv, 1, head), v = part_rows(p, qkv, 2, head);
  const Rows<const T> grad = out_rows(p, grad_out, head), value = out_rows(p, out, head);
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;

  float* const partial = partials + (int64_t(slot) * p.heads + head) * (p.offsets() + 1);
  float* const table = stage_gradient ? shared.take<float>(p.offsets()) : partial;
  float* const table_zero = table + p.offset_index(Place{{0, 0, 0}}, Place{{0, 0, 0}});
  for (int i = thread; i < p.offsets(); i += S::threads) table[i] = 0.0f;
  float scale_sum = 0.0f;

#pragma unroll 1
  for (int64_t item = slot; item < items; item += slots) {
    const Part part = part_of(p, item, S::rows);
    const bool busy = thread / 32 * 16 < part.rows;
    auto fetch = [&](int first, bool odd) {
      if (thread < COLUMNS) set_label(p, part, odd ? keys1 : keys0, thread, first + thread);
      copy_rows<T, Width, COLUMNS>(p, part, first, odd ? k_tiles[1] : k_tiles[0], k, odd ? v_tiles[1] : v_tiles[0], v);
    };
    __syncthreads();  // [barrier: next part] the last part's tiles have been read, and the table is zero
    if (thread < S::rows) set_label(p, part, queries, thread, part.first_row + thread);
    copy_rows<T, Width, S::rows>(p, part, part.first_row, q_tile, q, grad_tile, grad);
    fetch(0, false);
    gpu::wait_for_copies();
    __syncthreads();  // [barrier: rows landed]
    normalise<T, Width, S::rows>(q_tile, lengths);
    {  // delta = out · grad_out, the mean of the probabilities' gradients that the softmax subtracts
      constexpr int share = S::threads / S::rows;
      const int own = thread / share, part_of_row = thread % share;
      const int64_t token = token_at(p, part, part.first_row + own);
      float product = 0.0f;
#pragma unroll 1
      for (int c = part_of_row * S::chunk; c < p.width; c += share * S::chunk) {
        if (token < 0) continue;
        float x[S::chunk], y[S::chunk];
        load_chunk(x, value[token] + c);
        load_chunk(y, grad_tile + own * S::stride + c);
#pragma unroll
        for (int i = 0; i < S::chunk; ++i) product = fmaf(x[i], y[i], product);
      }
#pragma unroll
      for (int lanes = 1; lanes < share; lanes *= 2) product += gpu::shuffle_xor(product, lanes);
      if (part_of_row == 0) {
        delta_rows[own] = product;
        lse_rows[own] = token < 0 ? INFINITE : lse[p.row_offset(token, head)];  // an absent query has no probabilities
        if (token >= 0) delta[p.row_offset(token, head)] = product;
      }
    }

    float sum[Width / 8][4];
    set_zero(sum);
    bool odd = false;
#pragma unroll 1
    for (int first = 0; first < p.tokens(); first += COLUMNS, odd = !odd) {
      gpu::wait_for_copies();
      __syncthreads();  // [barrier: keys landed] and the other tile and the gradient tile have been read
      if (first + COLUMNS < p.tokens()) fetch(first + COLUMNS, !odd);
      T* const k_tile = odd ? k_tiles[1] : k_tiles[0];
      normalise<T, Width, COLUMNS>(k_tile, nullptr);
      __syncthreads();  // [barrier: keys normalised]
      const Labels keys = odd ? keys1 : keys0;
      if (busy) {
        float x[N][4], dp[N][4];
        multiply_transposed<T, Width, N>(x, q_tile + thread / 32 * 16 * S::stride, k_tile);
        multiply_transposed<T, Width, N>(dp, grad_tile + thread / 32 * 16 * S::stride, odd ? v_tiles[1] : v_tiles[0]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = row + 8 * half, code = queries.code[r], region = queries.region[r];
          const float row_lse = lse_rows[r], row_delta = delta_rows[r];
#pragma unroll
          for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int c = 8 * n + column + i;
              float& element = x[n][2 * half + i];
              const float y = logit(element, scale, bias, code, keys.code[c], region, keys.region[c], p.mask_value);
              const float gradient = exponential<T>(y - row_lse) * (dp[n][2 * half + i] - row_delta);
              scale_sum = fmaf(gradient, element, scale_sum);
              gradient_tile[r * S::gradient_stride + c] = gradient;
              element = gradient * scale;
            }
          }
        }
        multiply_add<T, Width, N>(sum, x, k_tile);
      }
      __syncthreads();  // [barrier: gradient tile]
      const int rest = p.tokens() - first;
      add_to_table(p, table_zero, gradient_tile, S::gradient_stride, queries.code, part.rows, part.first_row, keys.code,
                   rest < COLUMNS ? rest : COLUMNS, first, S::threads);
    }
    if (busy) {
      write_gradient_of_normalised<T, Width>(p, part, sum, q, part_rows(p, grad_qkv, 0, head), lengths);
    }
  }

  scale_sums[thread] = scale_sum;
  __syncthreads();  // [barrier: sums]
  if (thread == 0) {
    float all = 0.0f;
    for (int i = 0; i < S::threads; ++i) all += scale_sums[i];
    partial[p.offsets()] = all * scale;
  }
  if (!stage_gradient) return;
  for (int i = thread; i < p.offsets(); i += S::threads) partial[i] = table[i];
}

// Rows are keys, columns are queries, and so all matrices are transposed.
template <typename T, int Width>
__global__ void __launch_bounds__(Tiles<T, Width>::threads, Tiles<T, Width>::blocks)
    backward_keys_kernel(const Problem p, const T* grad_out, const T* qkv, const float* logit_scale, const float* bias_table,
                         const bool stage_bias, const float* lse, const float* delta, T* grad_qkv) {
  using S = Tiles<T, Width>;
  constexpr int COLUMNS = S::backward_columns, N = COLUMNS / 8;
  SharedMemory shared;
  T* k_tile = shared.take<T>(S::rows * S::stride);
  T* v_tile = shared.take<T>(S::rows * S::stride);
  T* q_tiles[2] = {shared.take<T>(COLUMNS * S::stride), shared.take<T>(COLUMNS * S::stride)};
  T* grad_tiles[2] = {shared.take<T>(COLUMNS * S::stride), shared.take<T>(COLUMNS * S::stride)};
  const Labels keys = {shared.take<int>(S::rows), shared.take<int>(S::rows)};
  float* const lengths = shared.take<float>(S::rows);
  const Labels queries0 = {shared.take<int>(COLUMNS), shared.take<int>(COLUMNS)};
  const Labels queries1 = {shared.take<int>(COLUMNS), shared.take<int>(COLUMNS)};
  float* lse_columns[2] = {shared.take<float>(COLUMNS), shared.take<float>(COLUMNS)};
  float* delta_columns[2] = {shared.take<float>(COLUMNS), shared.take<float>(COLUMNS)};

  const int head = blockIdx.x % p.heads;
  const Part part = part_of(p, blockIdx.x / p.heads, S::rows);
  const float* bias = bias_of(p, shared, bias_table, head, stage_bias, S::threads);
  const float scale = scale_of(logit_scale[head]);
  const Rows<const T> q = part_rows(p, qkv, 0, head), k = part_rows(p, qkv, 1, head), v = part_rows(p, qkv, 2, head);
  const Rows<const T> grad = out_rows(p, grad_out, head);
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const bool busy = thread / 32 * 16 < part.rows;

  auto fetch = [&](int first, bool odd) {
    if (thread < COLUMNS) {
      set_label(p, part, odd ? queries1 : queries0, thread, first + thread);
      const int64_t token = token_at(p, part, first + thread);
      (odd ? lse_columns[1] : lse_columns[0])[thread] = token < 0 ? INFINITE : lse[p.row_offset(token, head)];
      (odd ? delta_columns[1] : delta_columns[0])[thread] = token < 0 ? 0.0f : delta[p.row_offset(token, head)];
    }
    copy_rows<T, Width, COLUMNS>(p, part, first, odd ? q_tiles[1] : q_tiles[0], q, odd ? grad_tiles[1] : grad_tiles[0], grad);
  };

  if (thread < S::rows) set_label(p, part, keys, thread, part.first_row + thread);
  copy_rows<T, Width, S::rows>(p, part, part.first_row, k_tile, k, v_tile, v);
  fetch(0, false);
  gpu::wait_for_copies();
  __syncthreads();  // [barrier: rows landed]
  normalise<T, Width, S::rows>(k_tile, lengths);

  float k_sum[Width / 8][4], v_sum[Width / 8][4];
  set_zero(k_sum);
  set_zero(v_sum);
  bool odd = false;
#pragma unroll 1
  for (int first = 0; first < p.tokens(); first += COLUMNS, odd = !odd) {
    gpu::wait_for_copies();
    __syncthreads();  // [barrier: queries landed] and the other tile has been read
    if (first + COLUMNS < p.tokens()) fetch(first + COLUMNS, !odd);
    T* const q_tile = odd ? q_tiles[1] : q_tiles[0];
    T* const grad_tile = odd ? grad_tiles[1] : grad_tiles[0];
    normalise<T, Width, COLUMNS>(q_tile, nullptr);
    __syncthreads();  // [barrier: queries normalised]
    if (!busy) continue;
    const Labels queries = odd ? queries1 : queries0;
    const float* const column_lse = odd ? lse_columns[1] : lse_columns[0];
    const float* const column_delta = odd ? delta_columns[1] : delta_columns[0];

    float x[N][4], dp[N][4];
    multiply_transposed<T, Width, N>(x, k_tile + thread / 32 * 16 * S::stride, q_tile);
    multiply_transposed<T, Width, N>(dp, v_tile + thread / 32 * 16 * S::stride, grad_tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int code = keys.code[row + 8 * half], region = keys.region[row + 8 * half];
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int c = 8 * n + column + i;
          float& element = x[n][2 * half + i];
          const float y = logit(element, scale, bias, queries.code[c], code, queries.region[c], region, p.mask_value);
          element = exponential<T>(y - column_lse[c]);
          dp[n][2 * half + i] = element * (dp[n][2 * half + i] - column_delta[c]) * scale;
        }
      }
    }
    multiply_add<T, Width, N>(v_sum, x, grad_tile);
    multiply_add<T, Width, N>(k_sum, dp, q_tile);
  }
  if (!busy) return;

  write_gradient_of_normalised<T, Width>(p, part, k_sum, k, part_rows(p, grad_qkv, 1, head), lengths);
  const Rows<T> grad_v = part_rows(p, grad_qkv, 2, head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = token_at(p, part, part.first_row + row + 8 * half);
    if (token < 0) continue;
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
      if (8 * n < p.width) store_pair(grad_v[token] + column + 8 * n, v_sum[n][2 * half], v_sum[n][2 * half + 1]);
    }
  }
}

// Adds the partial gradients of all slots: a thread adds every REDUCE_LANES-th, and the block adds those sums in order.
__global__ void __launch_bounds__(REDUCE_ENTRIES* REDUCE_LANES)
    reduce_kernel(const Problem p, const float* partials, const int slots, const float* logit_scale, float* grad_logit_scale,
                  float* grad_bias_table) {
  SharedMemory shared;
  float* const sums = shared.take<float>(REDUCE_ENTRIES * REDUCE_LANES);
  const int entries = p.offsets() + 1, blocks = (entries + REDUCE_ENTRIES - 1) / REDUCE_ENTRIES;
  const int head = blockIdx.x / blocks, thread = threadIdx.x, lane = thread / REDUCE_ENTRIES;
  const int entry = int(blockIdx.x % blocks) * REDUCE_ENTRIES + thread % REDUCE_ENTRIES;
  float sum = 0.0f;
  if (entry < entries) {
    for (int slot = lane; slot < slots; slot += REDUCE_LANES) sum += partials[(int64_t(slot) * p.heads + head) * entries + entry];
  }
  sums[thread] = sum;
  __syncthreads();  // [barrier: reduce]
  if (lane > 0 || entry >= entries) return;
  for (int i = 1; i < REDUCE_LANES; ++i) sum += sums[thread + i * REDUCE_ENTRIES];
  if (entry < p.offsets()) {
    grad_bias_table[int64_t(head) * p.offsets() + entry] = sum;
  } else {
    grad_logit_scale[head] = logit_scale[head] > float(MAX_LOGIT_SCALE) ? 0.0f : sum;
  }
}

// -- launchers -----------------------------------------------------------------------------------------------------------

// Shared memory beyond which a table stays in global memory: more would leave a multiprocessor with a single block.
constexpr int STAGING_BYTES = 96 * 1024;

bool room_for(int bytes, int limit) { return bytes <= std::min(limit, STAGING_BYTES); }

int64_t checked_blocks(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("cosine_window_attention: too many windows for one launch");
  return blocks;
}

template <typename T, int Width>
struct Launcher {
  using S = Tiles<T, Width>;

  static void forward(const Problem& p, const void* qkv, const float* logit_scale, const float* bias_table, void* out,
                      float* lse, gpu::Stream stream) {
    const int tables = aligned(p.offsets() * 4), tiles = forward_bytes<T, Width>();
    const bool stage = room_for(tiles + tables, gpu::shared_memory_limit());
    gpu::launch(&forward_kernel<T, Width>, checked_blocks(parts(p, S::rows) * p.heads), S::threads, tiles + (stage ? tables : 0),
                stream, p, static_cast<const T*>(qkv), logit_scale, bias_table, stage, static_cast<T*>(out), lse);
  }

  static void backward(const Problem& p, const void* grad_out, const void* qkv, const float* logit_scale,
                       const float* bias_table, const void* out, const float* lse, void* grad_qkv, float* grad_logit_scale,
                       float* grad_bias_table, float* scratch, gpu::Stream stream) {
    const int limit = gpu::shared_memory_limit(), table = aligned(p.offsets() * 4);
    const int64_t items = parts(p, S::rows);
    const int slots = slots_for(p, items);
    float* const delta = scratch;
    float* const partials = scratch + p.batch * p.map_tokens() * p.heads;

    const int tiles = backward_queries_bytes<T, Width>();
    const bool stage_gradient = room_for(tiles + table, limit);  // it is written, so it comes first
    const bool stage_bias = room_for(tiles + 2 * table, limit);
    gpu::launch(&backward_queries_kernel<T, Width>, checked_blocks(int64_t(slots) * p.heads), S::threads,
                tiles + (stage_gradient ? table : 0) + (stage_bias ? table : 0), stream, p, static_cast<const T*>(grad_out),
                static_cast<const T*>(qkv), logit_scale, bias_table, stage_bias, stage_gradient, static_cast<const T*>(out), lse,
                delta, static_cast<T*>(grad_qkv), partials, items, slots);

    const int key_tiles = backward_keys_bytes<T, Width>();
    const bool stage = room_for(key_tiles + table, limit);
    gpu::launch(&backward_keys_kernel<T, Width>, checked_blocks(items * p.heads), S::threads, key_tiles + (stage ? table : 0),
                stream, p, static_cast<const T*>(grad_out), static_cast<const T*>(qkv), logit_scale, bias_table, stage, lse,
                static_cast<const float*>(delta), static_cast<T*>(grad_qkv));

    const int blocks = (p.offsets() + 1 + REDUCE_ENTRIES - 1) / REDUCE_ENTRIES;
    gpu::launch(&reduce_kernel, checked_blocks(int64_t(blocks) * p.heads), REDUCE_ENTRIES * REDUCE_LANES,
                REDUCE_ENTRIES * REDUCE_LANES * 4, stream, p, static_cast<const float*>(partials), slots, logit_scale,
                grad_logit_scale, grad_bias_table);
  }
};

}  // namespace

template <typename T>
Launchers launchers_of_type(int width) {
  if (width <= 32) return {&Launcher<T, 32>::forward, &Launcher<T, 32>::backward};
  if (width <= 64) return {&Launcher<T, 64>::forward, &Launcher<T, 64>::backward};
  return {&Launcher<T, 128>::forward, &Launcher<T, 128>::backward};
}

#if defined(ELEMENT)
template Launchers launchers_of_type<gpu::ELEMENT>(int width);
#else
template Launchers launchers_of_type<gpu::float32>(int width);
template Launchers launchers_of_type<gpu::bfloat16>(int width);
template Launchers launchers_of_type<gpu::float16>(int width);
#endif

}  // namespace cosine_window_attention::cuda
