// The table of position biases, 16 · sigmoid(W₂ · relu(W₁ · coordinates + b₁)), and its gradients, on CPU. The hidden layer
// is never in memory: it is three instructions from the coordinates, and is computed again wherever it is needed. Compiled
// once per instruction set, like the attention.

#include "position_bias_cpu.h"

#include "vectors.h"

namespace swinv2_position_bias {
namespace {

using namespace vectors;

constexpr int LANE = LANES<float>;
constexpr int GROUP = REGISTERS / 2;  // heads whose sums are in registers at a time
constexpr int PART = 64;              // offsets whose gradients are added up before they join the sum of all

int64_t offset_tasks(const Call& call) { return (call.offsets + LANE - 1) / LANE; }
int64_t hidden_tasks(const Call& call) { return call.hidden / LANE; }

INLINE Vec<float> relu(Vec<float> x) { return x < 0.0f ? Vec<float>{} : x; }  // NaN from NaN

// A vector of offsets: their coordinates, zeros beyond the last.
INLINE int load_coordinates(const Call& call, int64_t first, Vec<float> (&x)[MAX_AXES]) {
  const int count = int(call.offsets - first < LANE ? call.offsets - first : LANE);
  for (int axis = 0; axis < MAX_AXES; ++axis) {
    float lanes[LANE] = {};
    for (int i = 0; axis < call.axes && i < count; ++i) lanes[i] = call.coordinates[(first + i) * call.axes + axis];
    x[axis] = load(lanes);
  }
  return count;
}

void forward(const Call& call, int64_t task) {
  Vec<float> x[MAX_AXES];
  const int64_t first = task * LANE;
  const int count = load_coordinates(call, first, x);
  for (int begin = 0; begin < call.heads; begin += GROUP) {
    const int heads = least(GROUP, call.heads - begin);
    Vec<float> logits[GROUP] = {};
    for (int unit = 0; unit < call.hidden; unit += LANE) {
      float weights[LANE][GROUP] = {};  // of some hidden units and the heads, side by side
      for (int head = 0; head < heads; ++head)
        for (int i = 0; i < LANE; ++i) weights[i][head] = call.weight2[int64_t(begin + head) * call.hidden + unit + i];
      for (int i = 0; i < LANE; ++i) {
        Vec<float> hidden = splat(call.bias1[unit + i]);
        for (int axis = 0; axis < call.axes; ++axis) hidden += x[axis] * call.weight1[(unit + i) * call.axes + axis];
        hidden = relu(hidden);
        for (int head = 0; head < GROUP; ++head) logits[head] += hidden * weights[i][head];
      }
    }
    for (int head = 0; head < heads; ++head) {
      const Vec<float> power = logits[head] * float(-LOG2_E);
      const Vec<float> biases = 16.0f / (1.0f + exp2(power > 126.0f ? splat(126.0f) : power));
      memcpy(call.out + (begin + head) * call.offsets + first, &biases, count * sizeof(float));
    }
  }
}

void slopes(const Call& call, int64_t task) {
  const int64_t first = task * LANE, last = first + LANE < call.offsets ? first + LANE : call.offsets;
  for (int head = 0; head < call.heads; ++head)
    for (int64_t i = first; i < last; ++i) {
      const float out = call.out[head * call.offsets + i];
      call.slopes[i * call.heads + head] = call.grad[head * call.offsets + i] * out * (1.0f - out / 16.0f);
    }
}

// Of the weights of a vector of hidden units.
void gradients(const Call& call, int64_t task) {
  const int64_t first = task * LANE;
  const int axes = call.axes, heads = call.heads;
  Vec<float> weight1[MAX_AXES] = {}, weight1_grad[MAX_AXES] = {}, bias1_grad{}, weight2[MAX_HEADS], weight2_grad[MAX_HEADS];
  const Vec<float> bias1 = load(call.bias1 + first);
  for (int axis = 0; axis < axes; ++axis)
    for (int i = 0; i < LANE; ++i) weight1[axis][i] = call.weight1[(first + i) * axes + axis];
  for (int head = 0; head < heads; ++head) {
    weight2[head] = load(call.weight2 + int64_t(head) * call.hidden + first);
    weight2_grad[head] = Vec<float>{};
  }
  for (int64_t begin = 0; begin < call.offsets; begin += PART) {
    const int64_t end = begin + PART < call.offsets ? begin + PART : call.offsets;
    Vec<float> of_weight1[MAX_AXES] = {}, of_bias1{}, of_weight2[MAX_HEADS];
    for (int head = 0; head < heads; ++head) of_weight2[head] = Vec<float>{};
    for (int64_t offset = begin; offset < end; ++offset) {
      const float *x = call.coordinates + offset * axes, *slope = call.slopes + offset * heads;
      Vec<float> hidden = bias1, grad{};
      for (int axis = 0; axis < axes; ++axis) hidden += weight1[axis] * x[axis];
      const auto active = hidden > 0.0f;
      hidden = relu(hidden);
      for (int head = 0; head < heads; ++head) {
        grad += weight2[head] * slope[head];
        of_weight2[head] += hidden * slope[head];
      }
      grad = active ? grad : Vec<float>{};
      of_bias1 += grad;
      for (int axis = 0; axis < axes; ++axis) of_weight1[axis] += grad * x[axis];
    }
    bias1_grad += of_bias1;
    for (int axis = 0; axis < axes; ++axis) weight1_grad[axis] += of_weight1[axis];
    for (int head = 0; head < heads; ++head) weight2_grad[head] += of_weight2[head];
  }
  store(call.bias1_grad + first, bias1_grad);
  for (int axis = 0; axis < axes; ++axis)
    for (int i = 0; i < LANE; ++i) call.weight1_grad[(first + i) * axes + axis] = weight1_grad[axis][i];
  for (int head = 0; head < heads; ++head) store(call.weight2_grad + int64_t(head) * call.hidden + first, weight2_grad[head]);
}

}  // namespace

extern const Kernel INSTRUCTION_SET = {offset_tasks, hidden_tasks, forward, slopes, gradients};

}  // namespace swinv2_position_bias
