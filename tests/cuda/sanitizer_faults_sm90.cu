// Faults of clusters, mbarriers and the copies that complete on them, as sanitizer_faults.cu has
// them: blocks of 128 threads, in clusters of 2. An asm statement whose line is named stays on one.
#include <cstdint>

#ifndef FAULTY
#error "compile with -DFAULTY=0 or 1"
#endif

#define KERNEL extern "C" __global__ void __launch_bounds__(128)

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ uint32_t other_block(uint32_t address) {
  uint32_t mapped;
  asm("{ .reg .b32 %r; mov.u32 %r, %cluster_ctarank; xor.b32 %r, %r, 1; "
      "mapa.shared::cluster.u32 %0, %1, %r; }"
      : "=r"(mapped)
      : "r"(address));
  return mapped;
}
__device__ void init_mbarrier(uint32_t bar) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
}
__device__ void expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
#define WAIT_FOR(bar, parity)                                                     \
  asm volatile(                                                                   \
      "{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; " \
      "@!p bra W; }" ::"r"(bar),                                                  \
      "r"(parity)                                                                 \
      : "memory")
// The same for arrivals of other blocks.
#define WAIT_FOR_CLUSTER(bar, parity)                                                             \
  asm volatile(                                                                                   \
      "{ .reg .pred p; W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1; " \
      "@!p bra W; }" ::"r"(bar),                                                                  \
      "r"(parity)                                                                                 \
      : "memory")

// A relaxed arrival at the cluster's barrier passes on what a fence covers, and no more.
KERNEL mbarrier_init_without_fence(int* out) {
  __shared__ uint64_t word;
  uint32_t bar = shared_address(&word);
  if (threadIdx.x == 0) {
    init_mbarrier(bar);
    if (!FAULTY) fence_init();
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  cluster_wait();
  // clang-format off
  if (threadIdx.x == 0)
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(other_block(bar)) : "memory");  // expect: race
  WAIT_FOR_CLUSTER(bar, 0);  // or: race
  // clang-format on
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  cluster_sync();
}

// The copy of one block completes on the mbarrier of the other.
KERNEL multicast_before_init(const int* in, int* out) {
  __shared__ alignas(128) int tile[128];
  __shared__ uint64_t word;
  uint32_t bar = shared_address(&word);
  if (threadIdx.x == 0) {
    init_mbarrier(bar);
    if (!FAULTY) fence_init();
    expect(bar, sizeof tile);
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  cluster_wait();
  // clang-format off
  if (threadIdx.x == 0 && blockIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 512, [%2], %3;" ::"r"(shared_address(tile)), "l"(in), "r"(bar), "h"(uint16_t(3)) : "memory");  // expect: race
  WAIT_FOR(bar, 0);  // or: race
  // clang-format on
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x];
  cluster_sync();
}

// The block may be gone before the other one's stores arrive.
KERNEL store_to_remote_before_cluster_barrier(int* out) {
  __shared__ int tile[128];
  tile[threadIdx.x] = 0;  // expect: race
  if (FAULTY) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  // clang-format off
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(other_block(shared_address(tile + threadIdx.x))), "r"(threadIdx.x) : "memory");  // expect: race
  // clang-format on
  cluster_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x];  // or: race
}

// TMA reads shared memory that ordinary stores have written.
KERNEL bulk_store_without_proxy_fence(int* out) {
  __shared__ alignas(128) int tile[128];
  tile[threadIdx.x] = int(threadIdx.x);
  if (!FAULTY) fence_proxy();
  __syncthreads();
  if (threadIdx.x != 0) return;
  // clang-format off
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 512;" ::"l"(out + blockIdx.x * blockDim.x), "r"(shared_address(tile)) : "memory");  // expect: missing proxy fence
  // clang-format on
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// A stage is filled again while the threads of the block still read it.
KERNEL refill_over_readers(const int* in, int* out) {
  __shared__ alignas(128) int tile[128];
  __shared__ uint64_t words[2];
  if (threadIdx.x == 0) {
    init_mbarrier(shared_address(words));
    init_mbarrier(shared_address(words + 1));
    fence_init();
  }
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < 2; ++i) {
    uint32_t bar = shared_address(words + i);
    if (threadIdx.x == 0) {
      expect(bar, sizeof tile);
      // clang-format off
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];" ::"r"(shared_address(tile)), "l"(in + 128 * i), "r"(bar) : "memory");  // expect: race
      // clang-format on
    }
    WAIT_FOR(bar, 0);
    sum += tile[threadIdx.x ^ 64];  // expect: race | asynchronous copy not waited for
    if (!FAULTY) __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// The last arrival does not wait for the copy that it has announced.
KERNEL bulk_load_not_waited(const int* in, int* out) {
  __shared__ alignas(128) int tile[128];
  __shared__ uint64_t word;
  uint32_t bar = shared_address(&word);
  if (threadIdx.x == 0) {
    init_mbarrier(bar);
    fence_init();
    expect(bar, sizeof tile);
    // clang-format off
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];" ::"r"(shared_address(tile)), "l"(in), "r"(bar) : "memory");
    // clang-format on
  }
  __syncthreads();
  if (!FAULTY) WAIT_FOR(bar, 0);
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      tile[threadIdx.x];  // expect: asynchronous copy not waited for | race
  WAIT_FOR(bar, 0);
}
