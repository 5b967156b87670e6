// The instruction sets that files are compiled for, and which of them this process uses.

#pragma once

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

// What a namespace has for each of NAMES.
#if defined(__x86_64__)
#define EVERY_INSTRUCTION_SET {&portable, &avx2, &avx512, &avx512_bf16, &amx_bf16}
#else
#define EVERY_INSTRUCTION_SET {&portable}
#endif

namespace instruction_sets {

inline constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// How many of NAMES this processor has; each includes those before it.
inline int available() {
  static const int count = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 1;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq")))
      return 2;
    if (!__builtin_cpu_supports("avx512bf16")) return 3;
#if defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl: the system gives tiles to those who ask
    if (__builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) return 5;
#endif
    return 4;
#else
    return 1;
#endif
  }();
  return count;
}

// Place in NAMES of the best; for tests, SWINV2_SCALE_INSTRUCTION_SET names the one to use instead.
inline int chosen() {
  const char* name = std::getenv("SWINV2_SCALE_INSTRUCTION_SET");
  if (!name || !*name) return available() - 1;
  std::string names;
  for (int i = 0; i < available(); ++i) {
    if (std::strcmp(NAMES[i], name) == 0) return i;
    names += std::string(" ") + NAMES[i];
  }
  STD_TORCH_CHECK(false, "SWINV2_SCALE_INSTRUCTION_SET is ", name, ", but this processor has", names);
}

}  // namespace instruction_sets
