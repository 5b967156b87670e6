// A block's kernels under emulation as a program of its own, for AddressSanitizer, as check.cpp is for the attention: each
// tensor is one heap allocation of exactly its size. Exits with 1 if a result is not a number, as what kernels do not write is.
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -DCOSINE_WINDOW_ATTENTION_EMULATE check_block.cpp -o check -lpthread

#include "../block_cuda.cu"

#include <cstdio>
#include <memory>
#include <vector>

using namespace swinv2_block;

namespace {

struct Memory {
  cuda::Type type;
  int64_t count;
  std::unique_ptr<void, void (*)(void*)> bytes{nullptr, &std::free};

  // Of one number everywhere; a count of bits that are all set is NaN in every type.
  Memory(cuda::Type t, int64_t n, bool ones) : type(t), count(n) {
    const size_t size = n * (t == cuda::Type::float32 ? 4 : 2);
    void* aligned = nullptr;
    if (posix_memalign(&aligned, 16, size) != 0) throw std::bad_alloc();
    std::memset(aligned, ones ? 0x3c : 0xff, size);  // about 0.01 in every type, or 1 in float16
    bytes.reset(aligned);
  }
  double at(int64_t i) const {
    if (type == cuda::Type::float32) return static_cast<const float*>(bytes.get())[i];
    const uint16_t bits = static_cast<const uint16_t*>(bytes.get())[i];
    return type == cuda::Type::bfloat16 ? cuda::gpu::unpack<cuda::gpu::bfloat16>(bits).x
                                        : cuda::gpu::unpack<cuda::gpu::float16>(bits).x;
  }
  bool holds() const {
    for (int64_t i = 0; i < count; ++i) {
      if (!(std::abs(at(i)) < 1e9)) return false;
    }
    return true;
  }
};

bool holds(cuda::Type type, int64_t rows, int channels) {
  const cuda::Type exact = cuda::Type::float32;
  const cuda::Launchers kernels = cuda::launchers_for(type);
  const int64_t some = rows - rows / 4;  // have a branch
  const Memory x(type, rows * channels, true), y(type, some * channels, true);
  const Memory weight(exact, channels, true), keep(exact, some, true);
  const Memory out(type, rows * channels, false), added(type, rows * channels, false), statistics(exact, 2 * some, false), grad_y(type, some * channels, false);
  const Memory norm_total(exact, 2 * channels, false), norm_partials(exact, cuda::norm_chunks(some) * 2 * channels, false);
  std::vector<int64_t> images(rows);
  for (int64_t i = 0; i < rows; ++i) images[i] = rows - 1 - i;
  NormCall norm{};
  norm.rows = some, norm.all_rows = rows, norm.rows_per_image = 1, norm.images = images.data();
  norm.chunks = cuda::norm_chunks(some), norm.channels = channels, norm.eps = 1e-5;
  norm.x = norm.grad_out = x.bytes.get(), norm.y = y.bytes.get();
  norm.weight = norm.bias = weight.bytes.get(), norm.keep = keep.bytes.get();
  norm.out = out.bytes.get(), norm.statistics = statistics.bytes.get(), norm.grad_y = grad_y.bytes.get();
  norm.partials = norm_partials.bytes.get();
  kernels.norm_forward(norm, nullptr);
  kernels.norm_backward(norm, static_cast<float*>(norm_total.bytes.get()), nullptr);
  norm.out = added.bytes.get();
  kernels.add_images(norm, nullptr);

  const Memory gelu(type, rows * channels, false), again(type, rows * channels, false), grad(type, rows * channels, true);
  const Memory slopes(exact, channels, false), total(exact, channels, false);
  const Memory partials(exact, cuda::map_chunks(rows, channels) * channels, false);
  MapCall map{};
  map.rows = rows, map.channels = channels, map.chunks = cuda::map_chunks(rows, channels), map.input = x.bytes.get();
  map.out = gelu.bytes.get(), map.grad = grad.bytes.get(), map.partials = partials.bytes.get();
  kernels.gelu_forward(map, nullptr);
  map.out = again.bytes.get();
  kernels.gelu_backward(map, static_cast<float*>(slopes.bytes.get()), nullptr);
  kernels.sum_rows(map, static_cast<float*>(total.bytes.get()), nullptr);

  bool good = true;
  for (const Memory* result : {&out, &added, &statistics, &grad_y, &norm_total, &gelu, &again, &grad, &slopes, &total}) {
    good &= result->holds();
  }
  std::printf("%s type %d, %d rows of %d\n", good ? "ok  " : "FAIL", int(type), int(rows), channels);
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (const cuda::Type type : {cuda::Type::float32, cuda::Type::bfloat16, cuda::Type::float16}) {
    good &= holds(type, 37, 16) && holds(type, 37, 112) && holds(type, 5, 1040) && holds(type, 1, 4096);
  }
  return good ? 0 : 1;
}
