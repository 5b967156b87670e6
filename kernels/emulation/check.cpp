// The kernels under emulation against loops in double precision, as a program of its own: for AddressSanitizer, which sees
// every read and write out of bounds because each tensor and each shared array is one heap allocation.
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -DCOSINE_WINDOW_ATTENTION_EMULATE check.cpp -o check -lpthread
// Prints one line per problem; the exit code is the number of problems that failed.

#if !defined(KERNELS)
#define KERNELS "../cosine_window_attention_cuda.cu"
#endif
#include KERNELS

#include <algorithm>
#include <cstdio>
#include <random>

using namespace cosine_window_attention;
using Values = std::vector<double>;

namespace {

struct Tensors {
  Values qkv, logit_scale, bias_table, grad_out;
};
struct Results {
  Values out, grad_qkv, grad_logit_scale, grad_bias_table;
};

// One window, head and image at a time; all pairs in loops.
Results reference(const Problem& p, const Tensors& in) {
  const int64_t tokens = p.batch * p.map_tokens();
  Results r;
  r.out.resize(tokens * p.heads * p.width);
  r.grad_qkv.resize(in.qkv.size());
  r.grad_logit_scale.resize(p.heads);
  r.grad_bias_table.resize(int64_t(p.heads) * p.offsets());
  for (int64_t image = 0; image < p.batch; ++image) {
    for (int64_t number = 0; number < p.windows(); ++number) {
      const Place window = p.window_place(number);
      std::vector<int64_t> index;
      std::vector<Place> place;
      for (int t = 0; t < p.tokens(); ++t) {
        const int64_t token = p.token_index(image, window, p.token_place(t));
        if (token >= 0) index.push_back(token), place.push_back(p.token_place(t));
      }
      const int n = int(index.size()), width = p.width;
      for (int head = 0; head < p.heads; ++head) {
        const double scale = std::exp(std::min(in.logit_scale[head], MAX_LOGIT_SCALE));
        const bool clamped = in.logit_scale[head] > MAX_LOGIT_SCALE;
        Values unit[2], length[2];
        for (int part = 0; part < 2; ++part) {
          for (int i = 0; i < n; ++i) {
            const double* x = &in.qkv[p.qkv_offset(index[i], part, head)];
            double square = 0;
            for (int d = 0; d < width; ++d) square += x[d] * x[d];
            length[part].push_back(square == 0 ? 1 : std::sqrt(square));
            for (int d = 0; d < width; ++d) unit[part].push_back(x[d] / length[part][i]);
          }
        }
        Values grad_unit[2] = {Values(n * width), Values(n * width)};
        for (int i = 0; i < n; ++i) {
          Values cosine(n), y(n), dp(n);
          double highest = -INFINITY, total = 0, mean = 0;
          for (int j = 0; j < n; ++j) {
            for (int d = 0; d < width; ++d) cosine[j] += unit[0][i * width + d] * unit[1][j * width + d];
            y[j] = cosine[j] * scale + in.bias_table[int64_t(head) * p.offsets() + p.offset_index(place[i], place[j])];
            if (p.region(window, place[i]) != p.region(window, place[j])) y[j] += p.mask_value;
            highest = std::max(highest, y[j]);
          }
          for (int j = 0; j < n; ++j) total += y[j] = std::exp(y[j] - highest);
          const double* grad = &in.grad_out[p.out_offset(index[i], head)];
          for (int j = 0; j < n; ++j) {
            y[j] /= total;
            const int64_t v = p.qkv_offset(index[j], 2, head);
            for (int d = 0; d < width; ++d) {
              r.out[p.out_offset(index[i], head) + d] += y[j] * in.qkv[v + d];
              r.grad_qkv[v + d] += y[j] * grad[d];
              dp[j] += grad[d] * in.qkv[v + d];
            }
            mean += y[j] * dp[j];
          }
          for (int j = 0; j < n; ++j) {
            const double ds = y[j] * (dp[j] - mean);
            r.grad_bias_table[int64_t(head) * p.offsets() + p.offset_index(place[i], place[j])] += ds;
            if (!clamped) r.grad_logit_scale[head] += ds * cosine[j] * scale;
            for (int d = 0; d < width; ++d) {
              grad_unit[0][i * width + d] += ds * scale * unit[1][j * width + d];
              grad_unit[1][j * width + d] += ds * scale * unit[0][i * width + d];
            }
          }
        }
        for (int part = 0; part < 2; ++part) {
          for (int i = 0; i < n; ++i) {
            const double *g = &grad_unit[part][i * width], *u = &unit[part][i * width];
            double along = 0;
            for (int d = 0; d < width; ++d) along += g[d] * u[d];
            for (int d = 0; d < width; ++d) {
              r.grad_qkv[p.qkv_offset(index[i], part, head) + d] = (g[d] - u[d] * along) / length[part][i];
            }
          }
        }
      }
    }
  }
  return r;
}

// -- types ---------------------------------------------------------------------------------------------------------------

struct Bytes {  // a tensor in one of the three types, in an allocation of exactly its size
  cuda::Type type;
  int64_t count;
  std::unique_ptr<void, void (*)(void*)> memory;

  Bytes(cuda::Type t, int64_t n) : type(t), count(n), memory(nullptr, &std::free) {
    const size_t bytes = n * (t == cuda::Type::float32 ? 4 : 2);
    void* aligned = nullptr;
    if (posix_memalign(&aligned, 16, bytes) != 0) throw std::bad_alloc();
    std::memset(aligned, 0xff, bytes);  // not a number, in every type
    memory.reset(aligned);
  }
  Bytes(cuda::Type t, Values& values) : Bytes(t, int64_t(values.size())) {  // rounds the values as well
    for (int64_t i = 0; i < count; ++i) {
      if (t == cuda::Type::float32) {
        values[i] = static_cast<float*>(memory.get())[i] = float(values[i]);
      } else {
        uint16_t& to = static_cast<uint16_t*>(memory.get())[i];
        to = uint16_t(t == cuda::Type::bfloat16 ? gpu::pack<gpu::bfloat16>(float(values[i]), 0)
                                                : gpu::pack<gpu::float16>(float(values[i]), 0));
        values[i] = at(i);
      }
    }
  }
  double at(int64_t i) const {
    if (type == cuda::Type::float32) return static_cast<const float*>(memory.get())[i];
    const uint16_t bits = static_cast<const uint16_t*>(memory.get())[i];
    return type == cuda::Type::bfloat16 ? gpu::unpack<gpu::bfloat16>(bits).x : gpu::unpack<gpu::float16>(bits).x;
  }
};

double error(const Bytes& actual, const Values& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(actual.at(int64_t(i)) - expected[i], 2);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / std::max(size, 1e-2));
}

Values draw(int64_t count, std::mt19937& generator, double low, double high) {
  Values values;
  std::uniform_real_distribution<double> uniform(low, high);
  for (int64_t i = 0; i < count; ++i) values.push_back(uniform(generator));
  return values;
}

bool holds(const Problem& p, cuda::Type type, bool small_memory) {
  std::mt19937 generator(1);
  const int64_t tokens = p.batch * p.map_tokens();
  Tensors in;
  in.qkv = draw(tokens * 3 * p.heads * p.width, generator, -1, 1);
  for (int64_t i = 0; i < 3 * p.heads * p.width; ++i) in.qkv[i] = 0;  // the first token
  in.logit_scale = draw(p.heads, generator, 0, 3);
  in.bias_table = draw(int64_t(p.heads) * p.offsets(), generator, 0, 16);
  in.grad_out = draw(tokens * p.heads * p.width, generator, -1, 1);
  const Bytes qkv(type, in.qkv), grad_out(type, in.grad_out);
  const Bytes scale(cuda::Type::float32, in.logit_scale), table(cuda::Type::float32, in.bias_table);
  const Bytes out(type, tokens * p.heads * p.width), lse(cuda::Type::float32, tokens * p.heads);
  const Bytes grad_qkv(type, qkv.count), grad_scale(cuda::Type::float32, p.heads), grad_table(cuda::Type::float32, table.count);
  const Bytes scratch(cuda::Type::float32, cuda::backward_scratch(p));
  const auto numbers = [](const Bytes& x) { return static_cast<float*>(x.memory.get()); };
  gpu::settings.shared_memory_limit = small_memory ? 64 * 1024 : 227 * 1024;
  const cuda::Launchers launchers = cuda::launchers_for(p, type);
  launchers.forward(p, qkv.memory.get(), numbers(scale), numbers(table), out.memory.get(), numbers(lse), nullptr);
  launchers.backward(p, grad_out.memory.get(), qkv.memory.get(), numbers(scale), numbers(table), out.memory.get(), numbers(lse),
                     grad_qkv.memory.get(), numbers(grad_scale), numbers(grad_table), numbers(scratch), nullptr);
  const Results expected = reference(p, in);
  const double errors[4] = {error(out, expected.out), error(grad_qkv, expected.grad_qkv),
                            error(grad_scale, expected.grad_logit_scale), error(grad_table, expected.grad_bias_table)};
  const double unit = type == cuda::Type::float32 ? 6e-8 : type == cuda::Type::float16 ? 5e-4 : 4e-3;
  bool good = true;
  for (double e : errors) good &= e < 60 * unit;  // a coarse bound: tests/numerics/test_cuda_emulation.py has the budget
  std::printf("%s grid %d %d %d window %d %d %d width %d type %d: out %.1e qkv %.1e scale %.1e table %.1e\n", good ? "ok  " : "FAIL",
              p.grid[0], p.grid[1], p.grid[2], p.window[0], p.window[1], p.window[2], p.width, int(type), errors[0], errors[1],
              errors[2], errors[3]);
  return good;
}

}  // namespace

int main() {
  const float mask = -100.0f, strict = -INFINITY;
  const std::vector<Problem> problems = {
      {1, {1, 4, 5}, {1, 1, 1}, {0, 0, 0}, 2, 8, mask},     {1, {1, 9, 7}, {1, 3, 3}, {0, 1, 1}, 2, 16, strict},
      {2, {1, 14, 7}, {1, 7, 7}, {0, 3, 3}, 1, 32, mask},   {1, {1, 8, 16}, {1, 8, 8}, {0, 4, 4}, 1, 24, strict},
      {1, {1, 13, 12}, {1, 12, 12}, {0, 6, 0}, 1, 48, mask}, {1, {1, 7, 18}, {1, 7, 9}, {0, 0, 4}, 1, 128, mask},
      {1, {3, 7, 8}, {2, 7, 7}, {1, 3, 3}, 1, 40, strict},   {1, {1, 3, 17}, {1, 1, 8}, {0, 0, 4}, 2, 64, mask},
  };
  int failures = 0;
  for (const Problem& p : problems) {
    for (const cuda::Type type : {cuda::Type::float32, cuda::Type::bfloat16, cuda::Type::float16}) {
      try {
        failures += !holds(p, type, p.width == 48);
      } catch (const std::exception& problem) {
        std::printf("FAIL %s\n", problem.what());
        ++failures;
      }
    }
  }
  return failures;
}
