// An MLP, fc2(gelu(fc1(x))), and its gradients, each as one operator, where products are by vectors.
//
// A thread takes some hundred rows through all that happens to them: what lies between the products stays in its cache, and
// needs no memory of the hidden map's size. Results are those of the products and of GELU one by one, bit by bit.

#include "bindings_linear.h"

namespace swinv2_linear {
namespace {

constexpr int64_t MOST = 512, LEAST = 192;  // rows: the weights are read again for each part

const swinv2_block::Kernel& block_kernel(const Tensor& x) {
  const Choice found = kernels(x);
  STD_TORCH_CHECK(!std::strcmp(found.name, "vectors"), "MLPs are one operator only where products are by vectors");
  return *found.block;
}

int64_t over(int64_t count, int64_t part) { return (count + part - 1) / part; }

// As many rows as make all threads' shares alike: four parts for each thread, fewer before they have less than LEAST rows
// (one in any case), more before they have more than MOST.
int64_t part_of(int64_t rows, int64_t threads) {
  const int64_t parts = std::clamp<int64_t>(rows / (threads * LEAST), 1, std::max<int64_t>(4, over(rows, threads * MOST)));
  return over(over(rows, threads * parts), 8) * 8;
}

char* at(const Tensor& map, int64_t row) {
  const int64_t bytes = map.scalar_type() == ScalarType::Float ? 4 : 2;
  return static_cast<char*>(map.data_ptr()) + row * map.size(map.dim() - 1) * bytes;
}

// x (rows, channels) -> the output and, if it is to be kept, fc1's.
std::tuple<Tensor, Tensor> mlp_forward(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool keep) {
  const auto gelu = block_kernel(x).gelu_forward;
  const Product first(x, weight1, true, bias1), second(x, weight2, true, bias2);
  const int64_t rows = x.size(0), hidden = first.call.outputs, threads = torch::stable::get_num_threads();
  check_channels("x", x.size(1), first.call.inputs), check_channels("the hidden map", hidden, second.call.inputs);
  const int64_t part = part_of(rows, threads);
  Tensor room = torch::stable::new_empty(x, {threads * part, hidden});
  Tensor kept = torch::stable::new_empty(x, {keep ? rows : 0, hidden});
  Tensor out = torch::stable::new_empty(x, {rows, second.call.outputs});
  over_tasks(over(rows, part), [&](int64_t task, int64_t worker) {
    const int64_t begin = task * part, count = std::min(part, rows - begin);
    char* const activated = at(room, worker * part);
    char* const before = keep ? at(kept, begin) : activated;
    first.part(at(x, begin), before, count);
    swinv2_block::MapCall call{};
    call.channels = int(hidden), call.input = before, call.out = activated;
    gelu(call, 0, count);
    second.part(activated, at(out, begin), count);
  });
  return {out, kept};
}

// The gradients of x, and of the weight and bias of fc1 and of fc2 (biases' in float32), from that of the output. The chunks
// of tokens that gradients of weights are summed in are shared out among threads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(Tensor grad, Tensor x, Tensor hidden, Tensor weight1,
                                                                Tensor weight2) {
  const auto gelu = block_kernel(grad).gelu_backward;
  check("x", x, grad.scalar_type()), check("hidden", hidden, grad.scalar_type());
  const Product to_hidden(grad, weight2, false, std::nullopt), to_x(hidden, weight1, false, std::nullopt);
  const int64_t rows = grad.size(0), wide = to_x.call.inputs, threads = torch::stable::get_num_threads();
  STD_TORCH_CHECK(x.size(0) == rows && hidden.size(0) == rows, "x, hidden and grad must have as many tokens");
  check_channels("grad", grad.size(1), to_hidden.call.inputs), check_channels("x", x.size(1), to_x.call.outputs);
  check_channels("hidden", hidden.size(1), wide), check_channels("the hidden map", to_hidden.call.outputs, wide);
  Gradient first(grad, rows, wide, x.size(1), true), second(grad, rows, grad.size(1), wide, true);
  Tensor slopes = torch::stable::new_empty(grad, {threads * MOST, wide}), activated = torch::stable::empty_like(slopes);
  Tensor sums = torch::stable::new_empty(first.parts, {threads, wide}), out = torch::stable::empty_like(x);
  over_tasks(first.call.chunks, [&](int64_t chunk, int64_t worker) {
    const int64_t from = rows * chunk / first.call.chunks, to = rows * (chunk + 1) / first.call.chunks;
    swinv2_block::MapCall call{};
    call.channels = int(wide), call.chunks = 1, call.partials = static_cast<float*>(sums.data_ptr()) + worker * wide;
    call.grad = at(slopes, worker * MOST), call.out = at(activated, worker * MOST);
    for (int64_t begin = from; begin < to; begin += MOST) {
      call.rows = std::min(MOST, to - begin), call.input = at(hidden, begin);
      to_hidden.part(at(grad, begin), call.grad, call.rows);
      gelu(call, 0);
      second.part(chunk, at(grad, begin), call.out, call.rows, begin > from);
      first.part(chunk, call.grad, at(x, begin), call.rows, begin > from);
      to_x.part(call.grad, at(out, begin), call.rows);
    }
  });
  first.add_chunks(), second.add_chunks();
  return {out, first.out, first.bias, second.out, second.bias};
}

}  // namespace
}  // namespace swinv2_linear

STABLE_TORCH_LIBRARY_FRAGMENT(swinv2_scale, m) {
  m.def("mlp_forward(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool keep) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor grad, Tensor x, Tensor hidden, Tensor weight1, Tensor weight2) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&swinv2_linear::mlp_forward));
  m.impl("mlp_backward", TORCH_BOX(&swinv2_linear::mlp_backward));
}
