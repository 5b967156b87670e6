// The parts of a block on the CPU; see block_cpu.cpp.

#include "bindings_block.h"

#include <vector>

#include "block_cpu.h"
#include "instruction_sets.h"
#include "partials.h"

namespace swinv2_block {
namespace {

struct Cpu {
  static constexpr const char* NAME = "CPU";
  static constexpr bool NORM_ALONE = true;

  static bool holds(const Tensor& tensor, const Tensor&) { return tensor.is_cpu(); }
  static const Tensor& prepared(const Tensor& tensor) { return tensor; }

  static void check_order(const Tensor& images) {
    const int64_t count = images.numel(), *order = static_cast<const int64_t*>(images.const_data_ptr());
    std::vector<bool> seen(count);
    for (int64_t i = 0; i < count; ++i) {
      const bool fits = order[i] >= 0 && order[i] < count && !seen[order[i]];
      STD_TORCH_CHECK(fits, "images must have each of 0 to ", count - 1, " once, got ", order[i]);
      seen[order[i]] = true;
    }
  }

  // As many as keep many threads busy; never a function of how many there are, so that sums are added in one order.
  static int64_t norm_chunks(int64_t rows) { return rows < 32 ? rows : 32; }
  static int64_t map_chunks(int64_t rows, int) { return norm_chunks(rows); }

  static const Kernel& kernel_for(const Tensor& map) {
    static const InstructionSet* const sets[] = EVERY_INSTRUCTION_SET;
    const InstructionSet& set = *sets[instruction_sets::chosen()];
    switch (map.scalar_type()) {
      case ScalarType::Float: return set.float32;
      case ScalarType::BFloat16: return set.bfloat16;
      case ScalarType::Half: return set.float16;
      case ScalarType::Double: return set.float64;
      default: STD_TORCH_CHECK(false, "a map must be float32, bfloat16, float16 or float64");
    }
  }

  static void over_rows(const auto& call, auto work) {
    over_rows(call, call.rows, work);
  }
  static void over_rows(const auto& call, int64_t rows, auto work) {
    torch::stable::parallel_for(0, rows, 1 + (1 << 15) / call.channels,
                                [&](int64_t first, int64_t last) { work(call, first, last); });
  }
  static void over_chunks(const auto& call, auto work, const Tensor& partials, Tensor& total) {
    torch::stable::parallel_for(0, call.chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) work(call, chunk);
    });
    partials::sum(partials, total, call.chunks);
  }

  static void norm_forward(const Tensor& y, const NormCall& call) { over_rows(call, call.all_rows, kernel_for(y).norm_forward); }
  static void norm_backward(const Tensor& y, const NormCall& call, const Tensor& partials, Tensor& total) {
    over_chunks(call, kernel_for(y).norm_backward, partials, total);
  }
  static void add_images(const Tensor& x, const NormCall& call) { over_rows(call, call.all_rows, kernel_for(x).add_images); }
  static void gelu_forward(const Tensor& input, const MapCall& call) { over_rows(call, kernel_for(input).gelu_forward); }
  static void gelu_backward(const Tensor& input, const MapCall& call, const Tensor& partials, Tensor& total) {
    over_chunks(call, kernel_for(input).gelu_backward, partials, total);
  }
  static void sum_rows(const Tensor& input, const MapCall& call, const Tensor& partials, Tensor& total) {
    over_chunks(call, kernel_for(input).sum_rows, partials, total);
  }
};

}  // namespace
}  // namespace swinv2_block

STABLE_TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def(
      "residual_norm_forward(Tensor? x, Tensor y, Tensor weight, Tensor bias, Tensor? keep, Tensor? images, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "residual_norm_backward(Tensor grad_out, Tensor y, Tensor weight, Tensor? keep, Tensor? images, Tensor statistics)"
      " -> (Tensor, Tensor)");
  m.def("add_images(Tensor x, Tensor y, Tensor images) -> Tensor");
  m.def("gelu_forward(Tensor input) -> Tensor");
  m.def("gelu_backward(Tensor(a!) grad, Tensor input) -> (Tensor, Tensor)");
  m.def("sum_rows(Tensor input) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) { swinv2_block::Operators<swinv2_block::Cpu>::implement(m); }
