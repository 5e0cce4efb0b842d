// Thread block clusters (sm_90).
#pragma once

#include <cstdint>

namespace fused_peft::ptx {

__device__ inline uint32_t cluster_cta_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t cluster_cta_count() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(count));
  return count;
}

// The address of another CTA's shared memory that corresponds to one of one's own.
__device__ inline uint32_t cluster_address(uint32_t shared, uint32_t cta_rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(remote)
               : "r"(shared), "r"(cta_rank));
  return remote;
}

// A float at such an address, or four.
__device__ inline float load_cluster(uint32_t remote) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(remote) : "memory");
  return value;
}

// A word to such an address of another CTA, its bytes reported to the barrier at `remote_barrier`,
// of that CTA too.
__device__ inline void store_async_u32(uint32_t remote, uint32_t value, uint32_t remote_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];\n" ::"r"(
          remote),
      "r"(value), "r"(remote_barrier)
      : "memory");
}

__device__ inline float4 load_cluster_v4(uint32_t remote) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(remote)
               : "memory");
  return v;
}

// The two halves of cluster_sync.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// All threads of the cluster.
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace fused_peft::ptx
