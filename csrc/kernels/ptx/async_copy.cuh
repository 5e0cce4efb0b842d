// cp.async (sm_80), by 32-bit shared addresses: CuTe's wrappers convert a generic pointer at every
// call.
#pragma once

#include <cstdint>

namespace fused_peft::ptx {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes past L1; zeros where the predicate is false (nothing is then read).
__device__ inline void cp_async_16(uint32_t shared, const void* global, bool predicate) {
  const int bytes = predicate ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most N of this thread's newest groups are pending.
template <int N>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

}  // namespace fused_peft::ptx
