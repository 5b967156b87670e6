// What the operators of linear layers and MLPs on the CPU share; see bindings_linear.cpp and bindings_mlp.cpp.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "block_cpu.h"
#include "instruction_sets.h"
#include "linear_cpu.h"
#include "linear_vectors_cpu.h"
#include "partials.h"
#include "weight_gradient_cpu.h"

namespace swinv2_linear {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Choice {
  const char* name;  // "tiles", "vectors" or "none"
  swinv2_linear_vectors::Kernels kernels;
  const swinv2_block::Kernel* block;  // what an MLP has between its products
};

// What this process multiplies maps of a type with.
inline Choice choice(ScalarType type) {
#if defined(__x86_64__)
  const auto &vectors = swinv2_linear_vectors::avx512_bf16;
  const auto &block = swinv2_block::avx512_bf16, &beside_tiles = swinv2_block::amx_bf16;
  const std::string set = instruction_sets::NAMES[instruction_sets::chosen()];
  if (type == ScalarType::BFloat16 && set == "amx_bf16")
    return {"tiles", {amx_bf16, swinv2_weight_gradient::amx_bf16}, &beside_tiles.bfloat16};
  if (type == ScalarType::BFloat16 && set == "avx512_bf16") return {"vectors", vectors.bfloat16, &block.bfloat16};
  if (type == ScalarType::Float && set == "avx512_bf16") return {"vectors", vectors.float32, &block.float32};
#endif
  return {"none", {}, nullptr};
}

inline Choice kernels(const Tensor& map) {
  const Choice found = choice(map.scalar_type());
  STD_TORCH_CHECK(found.block, "this processor has no native products of maps of this type");
  return found;
}

inline void check(const char* name, const Tensor& matrix, ScalarType type) {
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.is_contiguous() && matrix.scalar_type() == type, name,
                  " must be contiguous, on the CPU and of the same type as the other");
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) > 0 && matrix.size(1) > 0 && matrix.size(1) % 32 == 0, name,
                  " must have two dimensions, the last a multiple of 32 channels");
}

// work(task, worker): no two of one worker at a time.
inline void over_tasks(int64_t count, auto work) {
  std::atomic<int64_t> next = 0;  // who is slowed down takes fewer
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next++) < count;) work(task, worker);
  });
}

// x (rows, inputs) times a weight, (outputs, inputs) if it is to be transposed, else (inputs, outputs).
struct Product {
  Kernel kernel;
  Call call{};
  Tensor panels;

  Product(const Tensor& x, const Tensor& weight, bool transposed, const std::optional<Tensor>& bias)
      : kernel(kernels(x).kernels.product), panels(torch::stable::empty_like(weight)) {
    const ScalarType type = x.scalar_type();
    check("x", x, type), check("weight", weight, type);
    STD_TORCH_CHECK(weight.size(0) % 32 == 0, "weight must have a multiple of 32 channels in both dimensions");
    call.transposed = transposed, call.rows = x.size(0);
    call.inputs = int(weight.size(transposed)), call.outputs = int(weight.size(!transposed));
    if (bias) {
      const bool fits = bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == type;
      STD_TORCH_CHECK(fits && bias->numel() == call.outputs, "bias must be ", call.outputs,
                      " numbers, of x's type, contiguous and on the CPU");
      call.bias = bias->data_ptr();
    }
    call.x = x.data_ptr(), call.weight = weight.data_ptr(), call.panels = panels.data_ptr();
    over_tasks(weight.size(0) / 32, [&](int64_t band, int64_t) { kernel.lay_out(call, band); });
  }

  // Some of the rows, by the thread that asks for it.
  void part(const void* x, void* out, int64_t rows) const {
    Call some = call;
    some.x = x, some.out = out, some.rows = rows, some.chunks = 1;
    for (int64_t task = 0; task < kernel.tasks(some); ++task) kernel.task(some, task);
  }
};

inline void check_channels(const char* name, int64_t channels, int64_t inputs) {
  STD_TORCH_CHECK(channels == inputs, name, " has ", channels, " channels, the weight ", inputs);
}

// The gradients of a weight, (outputs, inputs), and of a bias: a sum for each chunk of the tokens, and those of all.
struct Gradient {
  swinv2_weight_gradient::Kernel kernel;
  swinv2_weight_gradient::Call call{};
  Tensor parts, bias_parts, out, bias;

  // `kept`: whether the sums of chunks have memory; those of an only chunk can stay with the threads.
  Gradient(const Tensor& like, int64_t tokens, int64_t outputs, int64_t inputs, bool kept)
      : kernel(kernels(like).kernels.weight_gradient),
        parts(torch::stable::new_empty(like, {kept ? chunks_of(tokens) : 0, outputs, inputs}, ScalarType::Float)),
        bias_parts(torch::stable::new_empty(parts, {chunks_of(tokens), outputs})),
        out(torch::stable::new_empty(like, {outputs, inputs})),
        bias(torch::stable::new_empty(parts, {outputs})) {
    call.tokens = tokens, call.chunks = chunks_of(tokens), call.outputs = int(outputs), call.inputs = int(inputs);
    call.threads = int(torch::stable::get_num_threads());
    call.weight_grad = out.data_ptr(), call.bias_parts = static_cast<float*>(bias_parts.data_ptr());
    if (kept) call.weight_parts = static_cast<float*>(parts.data_ptr());
  }

  // As many chunks as keep many threads busy, an even number; never a function of how many threads there are.
  static int64_t chunks_of(int64_t tokens) { return std::clamp<int64_t>((tokens + 1024) / 4096 * 2, 1, 16); }

  // Some tokens of a chunk, in their order, by the thread that asks for it; where products are by vectors.
  void part(int64_t chunk, const void* grad, const void* x, int64_t tokens, bool continues) const {
    swinv2_weight_gradient::Call some = call;
    some.grad = grad, some.x = x, some.tokens = tokens, some.continues = continues, some.chunks = some.threads = 1;
    some.weight_parts += chunk * call.outputs * call.inputs, some.bias_parts += chunk * call.outputs;
    for (int64_t task = 0; task < kernel.tasks(some); ++task) kernel.task(some, task);
  }

  void add_chunks() {
    const int64_t squares = call.weight_parts ? call.outputs / 32 * (call.inputs / 32) : 0;
    over_tasks(squares, [&](int64_t square, int64_t) { kernel.add_parts(call, square); });
    partials::sum(bias_parts, bias, call.chunks);
  }
};

}  // namespace swinv2_linear
