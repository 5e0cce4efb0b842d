// Programmatic dependent launch (sm_90): a kernel may start while its predecessor drains.
#pragma once

namespace fused_peft::ptx {

// Until the kernels this one depends on are complete and their writes visible.
__device__ inline void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Lets the dependent kernel's CTAs be scheduled.
__device__ inline void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace fused_peft::ptx
