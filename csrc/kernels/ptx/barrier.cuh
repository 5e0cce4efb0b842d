// Barriers of some of a CTA's warps.
#pragma once

namespace fused_peft::ptx {

// Barrier kId (0 is __syncthreads') of kThreads threads, whole warps.
template <int kId, int kThreads>
__device__ inline void named_barrier_sync() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(kId), "n"(kThreads) : "memory");
}

}  // namespace fused_peft::ptx
