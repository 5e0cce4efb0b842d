// What the drivers share: aligned memory, scratch that stays with its thread, tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernels/common.h"

namespace fused_peft::cpu {

constexpr int64_t kAlignment = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

template <class T>
Buffer<T> allocate(int64_t count) {
  const auto bytes = static_cast<size_t>(
      round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), kAlignment));
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(kAlignment, bytes)));
}

// One thread's packing buffers, kept for the next call: they fit the L2 cache and stay in it.
inline char* thread_scratch(int64_t bytes) {
  thread_local Buffer<char> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory = allocate<char>(bytes);
    size = memory ? bytes : 0;
  }
  return memory.get();
}

// Runs fn(task, scratch) for every task; false when a thread had no memory for its scratch.
template <class Fn>
bool for_each_task(int64_t scratch_bytes, const ParallelFor& parallel, int64_t tasks,
                   const Fn& fn) {
  if (tasks <= 0) return true;
  struct Context {
    const Fn* fn;
    int64_t scratch_bytes;
    std::atomic<bool> failed{false};
  } context{&fn, scratch_bytes};
  const auto run_one = [](void* opaque, int64_t task) {
    auto* c = static_cast<Context*>(opaque);
    char* scratch = thread_scratch(c->scratch_bytes);
    if (scratch == nullptr)
      c->failed = true;
    else
      (*c->fn)(task, scratch);
  };
  if (tasks == 1 || parallel.num_threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) run_one(&context, task);
  } else {
    parallel.run(tasks, run_one, &context);
  }
  return !context.failed;
}

// Elements whose random word is below this are dropped: round(p * 2^32).
inline uint32_t dropout_threshold(double dropout_p) {
  const double scaled = std::floor(dropout_p * 4294967296.0 + 0.5);
  return static_cast<uint32_t>(std::min(scaled, 4294967295.0));
}

}  // namespace fused_peft::cpu
