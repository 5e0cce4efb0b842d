// Copies of boxes between a tensor that a CUtensorMap describes and shared memory (sm_90, TMA). One
// thread issues a copy.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fused_peft::ptx {

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// The box whose first element is (column, row), into shared memory; its bytes are reported to
// `barrier`.
__device__ inline void load_box(uint32_t shared, const CUtensorMap* map, int32_t column,
                                int32_t row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3}], [%4];\n" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same, into every CTA of the cluster that `ctas` has a bit for, at the same addresses.
__device__ inline void load_box_multicast(uint32_t shared, const CUtensorMap* map, int32_t column,
                                          int32_t row, uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ctas)
      : "memory");
}

// From shared memory; what lies outside the tensor is not written. Part of this thread's bulk
// group.
__device__ inline void store_box(const CUtensorMap* map, int32_t column, int32_t row,
                                 uint32_t shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(
          map),
      "r"(column), "r"(row), "r"(shared)
      : "memory");
}

__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

// Until at most N of this thread's newest bulk groups have not read their shared memory.
template <int N>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before asynchronous ones that follow.
__device__ inline void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

}  // namespace fused_peft::ptx
