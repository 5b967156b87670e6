// What each of the libraries of emulated kernels has: settings, and the message of the last error.

#pragma once

#include <cstdio>
#include <exception>

#include "../gpu.h"

namespace {

char message[512];

template <typename Call>
int guarded(Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& problem) {
    std::snprintf(message, sizeof message, "%s", problem.what());
    return 1;
  }
}

}  // namespace

extern "C" {

const char* emulation_error() { return message; }

void emulation_configure(uint64_t seed, int workers, int shared_memory_limit, int bfloat16) {
  cosine_window_attention::gpu::settings = {seed, workers, shared_memory_limit, bfloat16 != 0};
}
}
