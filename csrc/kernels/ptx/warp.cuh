// What concerns warps as such (sm_90): one of their lanes, their registers, a barrier of some.
#pragma once

#include <cstdint>

namespace fused_peft::ptx {

// True in one lane of a converged warp.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred chosen;\n"
      "elect.sync _|chosen, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, chosen;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// Registers a thread of a warpgroup: given back to the CTA, or taken from it.
template <int kRegisters>
__device__ inline void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// So many threads of the CTA, whole warps; barrier 0 is that of __syncthreads.
__device__ inline void barrier_sync(uint32_t barrier, uint32_t threads) {
  asm volatile("barrier.cta.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace fused_peft::ptx
