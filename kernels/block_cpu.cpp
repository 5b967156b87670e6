// What a block does besides its matrix products and its attention, on CPU: the residual sum with post-norm and drop path,
// GELU, and the sums over tokens that are gradients of biases. All of it is bound by memory: each map is read and written
// once, arithmetic is float32 (float64 for float64). Compiled once per instruction set, like the attention.

#include <stdint.h>
#include <string.h>

#include "block_cpu.h"
#include "gelu_cpu.h"
#include "vectors.h"

namespace swinv2_block {
namespace {

using namespace vectors;

// The sum over a row of f(first channel of a vector). Rows are multiples of 16 channels, so no vector is partial.
template <class T, class F>
INLINE Vec<T> sum_over(int channels, F f) {
  constexpr int LANE = LANES<T>;
  Vec<T> even{}, odd{};
  int j = 0;
  for (; j + 2 * LANE <= channels; j += 2 * LANE) even += f(j), odd += f(j + LANE);
  if (j < channels) even += f(j);
  return even + odd;
}

// The row of x that a row of y belongs to; beyond the last of y, those of the images that y does not have.
int64_t place(const NormCall& call, int64_t row) {
  return call.images ? call.images[row / call.rows_per_image] * call.rows_per_image + row % call.rows_per_image : row;
}

// out = x + keep · (norm(y) · weight + bias), row by row; statistics are mean and 1 / deviation. Rows count as in `place`.
template <class Element, class T>
void norm_forward(const NormCall& call, int64_t first, int64_t last) {
  constexpr int LANE = LANES<T>;
  const int channels = call.channels;
  const T *weight = static_cast<const T*>(call.weight), *bias = static_cast<const T*>(call.bias);
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = place(call, row) * channels;
    const Element* x = call.x ? static_cast<const Element*>(call.x) + at : nullptr;
    Element* out = static_cast<Element*>(call.out) + at;
    if (row >= call.rows) {
      memcpy(out, x, channels * sizeof(Element));
      continue;
    }
    const Element* y = static_cast<const Element*>(call.y) + row * channels;
    const T keep = call.keep ? static_cast<const T*>(call.keep)[row / call.rows_per_image] : T(1);
    const T mean = sum<T>(sum_over<T>(channels, [&](int j) { return load_wide(y + j); })) / T(channels);
    const T squares = sum<T>(sum_over<T>(channels, [&](int j) {
      const Vec<T> away = load_wide(y + j) - mean;
      return away * away;
    }));
    const T over = T(1) / root(squares / T(channels) + T(call.eps));
    for (int j = 0; j < channels; j += LANE) {
      const Vec<T> normed = (load_wide(y + j) - mean) * over * load(weight + j) + load(bias + j);
      store_narrow(out + j, x ? load_wide(x + j) + normed * keep : normed * keep);
    }
    T* statistics = static_cast<T*>(call.statistics) + 2 * row;
    statistics[0] = mean, statistics[1] = over;
  }
}

// The gradient of y, and the chunk's part of those of weight and bias.
template <class Element, class T>
void norm_backward(const NormCall& call, int64_t chunk) {
  constexpr int LANE = LANES<T>;
  const int channels = call.channels;
  const T* weight = static_cast<const T*>(call.weight);
  T* weight_grad = static_cast<T*>(call.partials) + chunk * 2 * channels;
  T* bias_grad = weight_grad + channels;
  memset(weight_grad, 0, 2 * channels * sizeof(T));
  for (int64_t row = call.rows * chunk / call.chunks; row < call.rows * (chunk + 1) / call.chunks; ++row) {
    const Element* grad = static_cast<const Element*>(call.grad_out) + place(call, row) * channels;
    const Element* y = static_cast<const Element*>(call.y) + row * channels;
    Element* grad_y = static_cast<Element*>(call.grad_y) + row * channels;
    const T keep = call.keep ? static_cast<const T*>(call.keep)[row / call.rows_per_image] : T(1);
    const T* statistics = static_cast<const T*>(call.statistics) + 2 * row;
    const T mean = statistics[0], over = statistics[1];
    Vec<T> along{}, level{};
    for (int j = 0; j < channels; j += LANE) {
      const Vec<T> g = load_wide(grad + j) * keep, normed = (load_wide(y + j) - mean) * over;
      const Vec<T> weighted = g * load(weight + j);
      level += weighted, along += weighted * normed;
      store(weight_grad + j, load(weight_grad + j) + g * normed);
      store(bias_grad + j, load(bias_grad + j) + g);
    }
    const T level_mean = sum<T>(level) / T(channels), along_mean = sum<T>(along) / T(channels);
    for (int j = 0; j < channels; j += LANE) {
      const Vec<T> normed = (load_wide(y + j) - mean) * over;
      const Vec<T> weighted = load_wide(grad + j) * keep * load(weight + j);
      store_narrow(grad_y + j, (weighted - level_mean - normed * along_mean) * over);
    }
  }
}

// out = x + y, of the images that y has.
template <class Element, class T>
void add_images(const NormCall& call, int64_t first, int64_t last) {
  const int channels = call.channels;
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = place(call, row) * channels;
    const Element *x = static_cast<const Element*>(call.x) + at, *y = static_cast<const Element*>(call.y) + row * channels;
    Element* out = static_cast<Element*>(call.out) + at;
    if (row >= call.rows) {
      memcpy(out, x, channels * sizeof(Element));
      continue;
    }
    for (int j = 0; j < channels; j += LANES<T>) store_narrow(out + j, load_wide(x + j) + load_wide(y + j));
  }
}

template <class Element, class T>
void gelu_forward(const MapCall& call, int64_t first, int64_t last) {
  const int64_t begin = first * call.channels;
  gelu::forward<Element, T>(static_cast<const Element*>(call.input) + begin, static_cast<Element*>(call.out) + begin,
                            last * call.channels - begin);
}

// The gradient of GELU's input, in the place of that of its output, and its sum over the chunk's rows; and GELU's output.
template <class Element, class T>
void gelu_backward(const MapCall& call, int64_t chunk) {
  T* sums = static_cast<T*>(call.partials) + chunk * call.channels;
  memset(sums, 0, call.channels * sizeof(T));
  for (int64_t row = call.rows * chunk / call.chunks; row < call.rows * (chunk + 1) / call.chunks; ++row) {
    const int64_t at = row * call.channels;
    gelu::backward<Element, T>(static_cast<const Element*>(call.input) + at, static_cast<Element*>(call.grad) + at,
                               static_cast<Element*>(call.out) + at, sums, call.channels);
  }
  gelu::settle<Element, T>(sums, call.channels);
}

template <class Element, class T>
void sum_rows(const MapCall& call, int64_t chunk) {
  T* sums = static_cast<T*>(call.partials) + chunk * call.channels;
  memset(sums, 0, call.channels * sizeof(T));
  for (int64_t row = call.rows * chunk / call.chunks; row < call.rows * (chunk + 1) / call.chunks; ++row) {
    const Element* x = static_cast<const Element*>(call.input) + row * call.channels;
    for (int j = 0; j < call.channels; j += LANES<T>) store(sums + j, load(sums + j) + load_wide(x + j));
  }
}

template <class Element, class T>
constexpr Kernel kernel = {norm_forward<Element, T>, norm_backward<Element, T>, add_images<Element, T>,
                           gelu_forward<Element, T>, gelu_backward<Element, T>, sum_rows<Element, T>};

}  // namespace

extern const InstructionSet INSTRUCTION_SET = {kernel<float, float>, kernel<BFloat16, float>, kernel<Float16, float>,
                                               kernel<double, double>};

}  // namespace swinv2_block
