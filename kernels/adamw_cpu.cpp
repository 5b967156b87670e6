// AdamW (arXiv 1711.05101, algorithm 2; in PyTorch's order) over flat weights, and the sum of squares that a gradient's
// norm is made of, on CPU. Bound by memory: gradients are read in the type that they have, each number once; weights are
// written in float32 and in the type that they train in. Compiled once per instruction set, like the attention.

#include "adamw_cpu.h"

#include "vectors.h"

namespace swinv2_adamw {
namespace {

using namespace vectors;

constexpr int LANE = LANES<float>;
constexpr int BLOCK = 1 << 12;  // elements whose squares are summed in float32

INLINE Vec<float> roots(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANE; ++i) x[i] = root(x[i]);
  return x;
#endif
}

// work(first element, count) over whole vectors, and what is left.
INLINE void over_vectors(int64_t first, int64_t last, auto work) {
  for (; first + LANE <= last; first += LANE) work(first, LANE);
  if (first < last) work(first, int(last - first));
}

template <class T>
INLINE Vec<float> load_some(const T* p, int count) {
  if (count == LANE) return load_wide(p);
  T some[LANE] = {};
  memcpy(some, p, count * sizeof(T));
  return load_wide(some);
}
template <class T>
INLINE void store_some(T* p, Vec<float> x, int count) {
  if (count == LANE) return store_narrow(p, x);
  T some[LANE];
  store_narrow(some, x);
  memcpy(p, some, count * sizeof(T));
}

template <class Gradient, class Trained>
void step(const Call& call, int64_t first, int64_t last) {
  const Gradient* gradient = static_cast<const Gradient*>(call.gradient);
  Trained* trained = static_cast<Trained*>(call.trained);
  over_vectors(first, last, [&](int64_t i, int count) {
    const Vec<float> g = load_some(gradient + i, count) * call.scale;
    Vec<float> mean = load_some(call.mean + i, count), square = load_some(call.square + i, count);
    mean += (g - mean) * call.mean_new;
    square = square * call.square_keep + g * g * call.square_new;
    const Vec<float> step = mean * call.rate / (roots(square) / call.root + call.eps);
    const Vec<float> weights = load_some(call.weights + i, count) * call.keep - step;
    store_some(call.mean + i, mean, count), store_some(call.square + i, square, count);
    store_some(call.weights + i, weights, count), store_some(trained + i, weights, count);
  });
}

template <class Gradient>
double squares(const void* values, int64_t first, int64_t last) {
  const Gradient* from = static_cast<const Gradient*>(values);
  double total = 0;
  for (int64_t begin = first; begin < last; begin += BLOCK) {
    Vec<float> even{}, odd{};
    over_vectors(begin, last - begin < BLOCK ? last : begin + BLOCK, [&](int64_t i, int count) {
      const Vec<float> x = load_some(from + i, count);
      (i / LANE % 2 ? odd : even) += x * x;
    });
    total += sum<float>(even + odd);
  }
  return total;
}

template <class Gradient, class Trained>
constexpr Kernel kernel = {step<Gradient, Trained>, squares<Gradient>};

}  // namespace

extern const InstructionSet INSTRUCTION_SET = {kernel<BFloat16, BFloat16>, kernel<Float16, Float16>, kernel<float, float>,
                                               kernel<float, BFloat16>, kernel<float, Float16>};

}  // namespace swinv2_adamw
