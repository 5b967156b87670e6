// The execution model of a GPU on the host, as far as the kernels here use it: grid, block, warp, shared memory, barriers,
// shuffles, matrix fragments, asynchronous copies. Included by ../gpu.h in place of the GPU's own instructions.
//
// Every thread of a block runs, as a fiber with its own stack. A fiber runs until it has to meet others: a block at
// `__syncthreads`, a warp at `__syncwarp`, a shuffle or a matrix instruction. Which one runs next is drawn from a generator
// seeded per block, so code that relies on an order it did not ask for gives results that change with the seed.
// What helps to see mistakes: shared memory starts as NaN; each of its arrays is a heap allocation of its own, so that
// AddressSanitizer sees an index out of bounds; an asynchronous copy reads and writes at the wait, not before; alignment is
// checked; threads that wait for others that never come are an error.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index3 {
  unsigned x;
};

namespace cosine_window_attention::gpu {

using Stream = void*;

// What a test chooses.
struct Settings {
  uint64_t seed = 0;
  int workers = 1;                   // operating system threads, each with its own block
  int shared_memory_limit = 99 * 1024;
  bool bfloat16 = true;
};
inline Settings settings;

constexpr int WARP = 32;

// -- fibers --------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee's registers on the stack of the caller, leaves its stack pointer in *from, and goes on at `to`.
extern "C" void cosine_window_attention_switch(void** from, void* to);
asm(R"(
.text
.weak cosine_window_attention_switch
.type cosine_window_attention_switch, @function
cosine_window_attention_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cosine_window_attention_switch, .-cosine_window_attention_switch
)");
#endif

class Fiber {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t STACK_BYTES = 512 * 1024;
#else
  static constexpr size_t STACK_BYTES = 128 * 1024;
#endif

  // Made ready to run `entry` at the next `resume`. The stack is kept from one block to the next.
  void prepare(void (*entry)()) {
    if (!stack_) stack_.reset(new char[STACK_BYTES]);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_.get(), STACK_BYTES);  // frames of the last block were left, not returned from
#endif
#if defined(__x86_64__)
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack_.get()) + STACK_BYTES) & ~uintptr_t(15);
    void** frame = reinterpret_cast<void**>(top);
    *--frame = nullptr;  // the return address of `entry`, which never returns
    *--frame = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--frame = nullptr;  // the six registers
    stack_pointer_ = frame;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = STACK_BYTES;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Runs the fiber from the scheduler until it yields.
  void resume(Fiber& scheduler) {
    announce(&scheduler.sanitizer_stack_, stack_.get(), STACK_BYTES);
    swap(scheduler, *this);
    arrived(scheduler.sanitizer_stack_, nullptr, nullptr);
  }
  // Called on the fiber: goes back to the scheduler.
  void yield(Fiber& scheduler, bool finished) {
    announce(finished ? nullptr : &sanitizer_stack_, scheduler_bottom_, scheduler_bytes_);
    swap(*this, scheduler);
    arrived(sanitizer_stack_, &scheduler_bottom_, &scheduler_bytes_);
  }
  // Called first thing on a new fiber.
  void started() { arrived(nullptr, &scheduler_bottom_, &scheduler_bytes_); }

 private:
  static void swap(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
    cosine_window_attention_switch(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
  }
  static void announce([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, bottom, bytes);
#endif
  }
  static void arrived([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, bottom, bytes);
#endif
  }

  std::unique_ptr<char[]> stack_;
  void* sanitizer_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_bytes_ = 0;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// -- one block -----------------------------------------------------------------------------------------------------------

class Block {
 public:
  // Runs all threads of one block to the end. Raises std::runtime_error for a deadlock or a misused instruction.
  void run(const std::function<void()>& kernel, int64_t number, int threads, int shared_bytes, uint64_t seed) {
    kernel_ = &kernel;
    number_ = unsigned(number);
    shared_bytes_ = shared_bytes;
    state_ = (seed + 1) * 0x9e3779b97f4a7c15ull ^ (uint64_t(number) + 1) * 0xbf58476d1ce4e5b9ull;
    error_.clear();
    shared_.clear();
    shared_sizes_.clear();
    if (int(fibers_.size()) < threads) fibers_.resize(threads);
    threads_.assign(threads, Thread());
    warps_.assign(threads / WARP, Meeting());
    block_ = Meeting();
    finished_ = 0;
    for (auto& list : runnable_) list.clear();
    fast_ = random();
    for (int i = 0; i < threads; ++i) {
      if (!fibers_[i]) fibers_[i].reset(new Fiber);
      fibers_[i]->prepare(&Block::enter);
      wake(i);
    }
    current_block = this;
    while (error_.empty() && !(runnable_[0].empty() && runnable_[1].empty())) {
      const bool fast = runnable_[0].empty() || (!runnable_[1].empty() && random() % 16 != 0);
      std::vector<int>& list = runnable_[fast];
      std::swap(list[random() % list.size()], list.back());
      current_ = list.back();
      list.pop_back();
      fibers_[current_]->resume(scheduler_);
    }
    current_block = nullptr;
    if (error_.empty() && finished_ < threads) error_ = "threads wait for others that never arrive";
    int used = 0;
    for (int bytes : shared_sizes_) used += (bytes + 15) / 16 * 16;
    if (error_.empty() && used != shared_bytes) {
      error_ = "launched with " + std::to_string(shared_bytes) + " bytes of shared memory, used " + std::to_string(used);
    }
    if (!error_.empty()) throw std::runtime_error("emulation: " + error_);
  }

  unsigned number() const { return number_; }
  unsigned thread() const { return unsigned(current_); }

  // The next array of shared memory: the first thread that asks allocates it.
  void* shared_array(int& count, int bytes) {
    if (count == int(shared_.size())) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 16, size_t(bytes)) != 0) throw std::bad_alloc();
      std::memset(memory, 0xff, size_t(bytes));
      shared_.emplace_back(memory, &std::free);
      shared_sizes_.push_back(bytes);
    }
    if (shared_sizes_[count] != bytes) fail("threads disagree on the size of a shared array");
    return shared_[count++].get();
  }

  void block_barrier() { meet(block_, 0, int(threads_.size()), 0, nullptr, nullptr); }

  // All lanes of the warp meet with an argument each; the last to arrive runs `act` on the 32 arguments.
  void warp_collective(int kind, void* argument, void (*act)(void* const*)) {
    const int warp = current_ / WARP;
    meet(warps_[warp], warp * WARP, WARP, kind, argument, act);
  }

  // Lands now or when it is waited for: either may happen.
  void copy_later(void* destination, const void* source, bool exists) {
    const Copy copy = {destination, source, exists};
    if (random() % 2 == 0) {
      copy.land();
    } else {
      threads_[current_].copies.push_back(copy);
    }
  }
  void complete_copies() {
    for (const Copy& copy : threads_[current_].copies) copy.land();
    threads_[current_].copies.clear();
  }

  // Ends the block with an error; the calling fiber never runs again.
  void fail(const std::string& message) {
    if (error_.empty()) error_ = message;
    fibers_[current_]->yield(scheduler_, true);
    std::abort();
  }

  static thread_local Block* current_block;

 private:
  struct Copy {
    void* destination;
    const void* source;
    bool exists;

    void land() const {
      if (exists) {
        std::memcpy(destination, source, 16);
      } else {
        std::memset(destination, 0, 16);
      }
    }
  };
  struct Thread {
    void* argument = nullptr;
    std::vector<Copy> copies;
  };
  struct Meeting {
    int arrived = 0, kind = 0;
  };

  static void enter() {
    Block& block = *current_block;
    const int self = block.current_;
    block.fibers_[self]->started();
    (*block.kernel_)();
    if (!block.threads_[self].copies.empty()) block.fail("a thread ended before its copies were waited for");
    ++block.finished_;
    block.fibers_[self]->yield(block.scheduler_, true);
    std::abort();
  }

  void meet(Meeting& meeting, int first, int count, int kind, void* argument, void (*act)(void* const*)) {
    const int self = current_;
    if (meeting.arrived > 0 && meeting.kind != kind) fail("lanes of a warp meet in different instructions");
    meeting.kind = kind;
    threads_[self].argument = argument;
    if (++meeting.arrived < count) {
      fibers_[self]->yield(scheduler_, false);
      return;
    }
    meeting.arrived = 0;
    if (act != nullptr) {
      void* arguments[WARP];
      for (int lane = 0; lane < WARP; ++lane) arguments[lane] = threads_[first + lane].argument;
      act(arguments);
    }
    for (int i = first; i < first + count; ++i) {
      wake(i);
    }
    // the last to arrive has no right to go on first
    fibers_[self]->yield(scheduler_, false);
  }

  // About half of the warps are fast: they run ahead of the others as far as barriers let them.
  void wake(int thread) { runnable_[fast_ >> thread / WARP & 1].push_back(thread); }

  uint64_t random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 11;
  }

  const std::function<void()>* kernel_ = nullptr;
  unsigned number_ = 0;
  int current_ = 0, finished_ = 0, shared_bytes_ = 0;
  uint64_t state_ = 1, fast_ = 0;
  std::string error_;
  Fiber scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Thread> threads_;
  std::vector<Meeting> warps_;
  Meeting block_;
  std::vector<int> runnable_[2];  // of slow warps, of fast ones
  std::vector<std::unique_ptr<void, void (*)(void*)>> shared_;
  std::vector<int> shared_sizes_;
};
inline thread_local Block* Block::current_block = nullptr;

// Not inlined: a fiber never moves to another operating system thread, but the compiler may not know.
inline Block& block() { return *Block::current_block; }

inline Index3 thread_index() { return {block().thread()}; }
inline Index3 block_index() { return {block().number()}; }

#define threadIdx ::cosine_window_attention::gpu::thread_index()
#define blockIdx ::cosine_window_attention::gpu::block_index()

inline void block_barrier() { block().block_barrier(); }
inline void warp_barrier() { block().warp_collective(1, nullptr, nullptr); }

#define __syncthreads ::cosine_window_attention::gpu::block_barrier
#define __syncwarp ::cosine_window_attention::gpu::warp_barrier

inline float __expf(float x) { return std::exp(x); }
using std::fabs;

// -- conversions ---------------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t round_to(float x, bfloat16*) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float value_of(uint16_t bits, bfloat16*) { return float_of(uint32_t(bits) << 16); }

inline uint16_t round_to(float x, float16*) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // Adding this power of two leaves ten fraction bits below it (fewer for subnormals, whose last place is 2^-24).
  int exponent = int(bits_of(magnitude) >> 23) - 127;
  if (exponent < -14) exponent = -14;
  const float unit = std::ldexp(1.0f, exponent - 10);
  const uint32_t steps = uint32_t(std::nearbyint(magnitude / unit));  // ties to even
  return sign | uint16_t((uint32_t(exponent + 14) << 10) + steps);    // 1024 steps carry into the exponent
}
inline float value_of(uint16_t bits, float16*) {
  const int exponent = bits >> 10 & 31;
  const float fraction = float(bits & 1023);
  float magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0f + fraction, exponent - 25);
  if (exponent == 31) magnitude = fraction == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <typename T>
uint32_t pack(float low, float high) {
  return uint32_t(round_to(low, static_cast<T*>(nullptr))) | uint32_t(round_to(high, static_cast<T*>(nullptr))) << 16;
}
template <typename T>
float2 unpack(uint32_t both) {
  return {value_of(uint16_t(both), static_cast<T*>(nullptr)), value_of(uint16_t(both >> 16), static_cast<T*>(nullptr))};
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

// -- instructions of a warp ----------------------------------------------------------------------------------------------

struct Shuffle {
  float value, result;
  int source;
};
inline void act_shuffle(void* const* lanes) {
  for (int lane = 0; lane < WARP; ++lane) {
    Shuffle& own = *static_cast<Shuffle*>(lanes[lane]);
    own.result = static_cast<Shuffle*>(lanes[own.source & 31])->value;
  }
}
inline float shuffle(float x, int lane) {
  Shuffle own = {x, 0.0f, lane};
  block().warp_collective(2, &own, &act_shuffle);
  return own.result;
}
inline float shuffle_xor(float x, int lanes) { return shuffle(x, int(threadIdx.x % WARP) ^ lanes); }

struct LoadMatrices {
  const void* row;
  uint32_t* registers;
};
// PTX ISA, ldmatrix: lanes 8·i … 8·i + 7 address the rows of matrix i; a lane receives from row lane / 4 the elements
// 2·(lane % 4) and the next. Transposed: the elements of column lane / 4 in rows 2·(lane % 4) and the next.
template <bool Transposed>
void act_load_matrices(void* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], static_cast<LoadMatrices*>(lanes[8 * matrix + row])->row, 16);
    }
    for (int lane = 0; lane < WARP; ++lane) {
      const int a = lane / 4, b = 2 * (lane % 4);
      const uint32_t low = Transposed ? elements[b][a] : elements[a][b];
      const uint32_t high = Transposed ? elements[b + 1][a] : elements[a][b + 1];
      static_cast<LoadMatrices*>(lanes[lane])->registers[matrix] = low | high << 16;
    }
  }
}
template <bool Transposed>
void load_matrices_as(uint32_t (&registers)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) block().fail("a matrix row is not aligned to 16 bytes");
  LoadMatrices own = {row, registers};
  block().warp_collective(Transposed ? 4 : 3, &own, &act_load_matrices<Transposed>);
}
inline void load_matrices(uint32_t (&registers)[4], const void* row) { load_matrices_as<false>(registers, row); }
inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row) { load_matrices_as<true>(registers, row); }

struct MultiplyAccumulate {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
// PTX ISA, mma.m16n8k16 with 16-bit a and b and float32 c: with group = lane / 4 and thread = lane % 4,
//   a: element i in row group + 8·(i / 2 odd), column 2·thread + i % 2 + 8·(i >= 4)
//   b: element i in row 2·thread + i % 2 + 8·(i >= 2), column group
//   c: element i in row group + 8·(i >= 2), column 2·thread + i % 2
template <typename T>
void act_multiply_accumulate(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const MultiplyAccumulate& own = *static_cast<MultiplyAccumulate*>(lanes[lane]);
    const int group = lane / 4, thread = lane % 4;
    for (int pair = 0; pair < 4; ++pair) {  // elements 2·pair and 2·pair + 1
      const float2 x = unpack<T>(own.a[pair]);
      const int row = group + (pair % 2 ? 8 : 0), column = 2 * thread + (pair >= 2 ? 8 : 0);
      a[row][column] = x.x;
      a[row][column + 1] = x.y;
    }
    for (int pair = 0; pair < 2; ++pair) {
      const float2 x = unpack<T>(own.b[pair]);
      const int row = 2 * thread + 8 * pair;
      b[row][group] = x.x;
      b[row + 1][group] = x.y;
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < WARP; ++lane) {
    float* c = static_cast<MultiplyAccumulate*>(lanes[lane])->c;
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 4; ++i) c[i] += product[group + (i >= 2 ? 8 : 0)][2 * thread + i % 2];
  }
}
template <typename T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyAccumulate own = {c, a, {b0, b1}};
  block().warp_collective(5, &own, &act_multiply_accumulate<T>);
}

// -- asynchronous copies, memory, launches -------------------------------------------------------------------------------

inline void copy_async(void* shared, const void* global, bool exists) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) block().fail("a copy's destination is not aligned to 16 bytes");
  if (exists && reinterpret_cast<uintptr_t>(global) % 16 != 0) block().fail("a copy's source is not aligned to 16 bytes");
  block().copy_later(shared, global, exists);
}
inline void wait_for_copies() { block().complete_copies(); }

class SharedMemory {
 public:
  template <typename T>
  T* take(int count) {
    return static_cast<T*>(block().shared_array(taken_, count * int(sizeof(T))));
  }

 private:
  int taken_ = 0;
};

inline int shared_memory_limit() { return settings.shared_memory_limit; }
inline bool has_bfloat16() { return settings.bfloat16; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Stream, Arguments... arguments) {
  if (shared_bytes > settings.shared_memory_limit) throw std::runtime_error("emulation: too much shared memory");
  const std::function<void()> run = [=] { kernel(arguments...); };
  // Blocks in an order of their own, too: nothing may rely on it.
  int64_t step = blocks > 1 ? int64_t(settings.seed * 2 + 1) % blocks : 1;
  while (std::gcd(step, blocks) != 1) ++step;
  std::mutex mutex;
  int64_t next = 0;
  std::string error;
  auto work = [&] {
    Block block;
    for (;;) {
      int64_t mine;
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (next == blocks || !error.empty()) return;
        mine = next++ * step % blocks;
      }
      try {
        block.run(run, mine, threads, shared_bytes, settings.seed);
      } catch (const std::exception& problem) {
        std::lock_guard<std::mutex> lock(mutex);
        error = problem.what();
      }
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < settings.workers; ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace cosine_window_attention::gpu
