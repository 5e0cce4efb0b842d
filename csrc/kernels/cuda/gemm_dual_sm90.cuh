// The GEMM of gemm_dual_sm80.cuh for sm_90a: tensor copies, wgmma, persistent CTAs.
//
// A warp fills a ring of stages through TMA: the k tiles of the first source, then, with the other
// pair of tensor maps, those of the second. Two warpgroups multiply what it has filled. A tile of
// k that holds less than 64 columns costs as many wgmma steps of 16 as hold data, so that the
// low-rank product costs ceil(R / 16) steps. CTAs go from tile to tile; the ring runs on over them,
// so the next tile's first stages are filled during the epilogue of the last.
//
// In a cluster the two CTAs have row tiles below one another. Each copies half of the tile of b
// into both, so a stage is free when it is in both.
#pragma once

#include "kernels/cuda/gemm_consumer_sm90.cuh"
#include "kernels/cuda/ring_sm90.cuh"
#include "kernels/ptx/async_copy.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/grid_dependency.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/warp.cuh"

namespace fused_peft::cuda {

// 65,536 registers for 384 threads: the copying warpgroup needs few, two times 128 threads hold 128
// accumulators each.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// Addresses in shared memory.
template <class Tile>
struct GemmSm90Shared {
  uint32_t base;

  __device__ explicit GemmSm90Shared(const void* dynamic)
      : base((ptx::shared_address(dynamic) + kPatternBytes - 1) / kPatternBytes * kPatternBytes) {}
  __device__ uint32_t a(uint32_t stage) const { return base + stage * Tile::kStageBytesA; }
  __device__ uint32_t b(uint32_t stage) const {
    return base + Tile::kStages * Tile::kStageBytesA + stage * Tile::kStageBytesB;
  }
  __device__ uint32_t store_buffers(int warp) const {
    return base + Tile::kStages * Tile::kStageBytes + warp * 2 * Tile::kStoreBoxBytes;
  }
  __device__ uint32_t full(uint32_t stage) const { return barriers() + 8 * stage; }
  __device__ uint32_t empty(uint32_t stage) const { return full(Tile::kStages + stage); }
  // Pingpong: a warpgroup's main loop may begin.
  __device__ uint32_t turn(uint32_t group) const { return full(2 * Tile::kStages + group); }

  __device__ uint32_t barriers() const {
    return base + Tile::kStages * Tile::kStageBytes + Tile::kStoreBytes;
  }
  __device__ void init_barriers(uint32_t cluster) const {
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), Tile::kStageWarps * cluster);
    }
    for (uint32_t group = 0; group < Tile::kConsumerGroups; ++group)
      ptx::mbarrier_init(turn(group), 4);
    ptx::mbarrier_init_fence();
  }
};

// The tiles of a CTA, in order. Clusters that run together share rows of a and of b in L2: the
// order goes down columns of raster_rows tiles.
struct TileWalk {
  int32_t index, step, rows, count;

  __device__ explicit TileWalk(const GemmSm90Params& p)
      : index(static_cast<int32_t>(blockIdx.x) / p.cluster),
        step(static_cast<int32_t>(gridDim.x) / p.cluster),
        rows((p.tiles_m + p.cluster - 1) / p.cluster),
        count(rows * p.tiles_n) {}
  __device__ bool done() const { return index >= count; }
  __device__ void advance(int times = 1) { index += times * step; }
  __device__ void place(const GemmSm90Params& p, int block_m, int block_n, int32_t* m0,
                        int32_t* n0) const {
    const int32_t group = index / (p.raster_rows * p.tiles_n), first = group * p.raster_rows;
    const int32_t height = min(p.raster_rows, rows - first);
    const int32_t inside = index - first * p.tiles_n;
    const auto rank = static_cast<int32_t>(ptx::cluster_cta_rank());
    *m0 = ((first + inside % height) * p.cluster + rank) * block_m;
    *n0 = inside / height * block_n;
  }
};

// Fills one stage. One thread.
template <class Tile, bool kBKMajor>
__device__ inline void fill_stage(const GemmSm90Params& p, const GemmSm90Shared<Tile>& shared,
                                  uint32_t stage, int source, int32_t k, int32_t m0, int32_t n0) {
  const uint32_t full = shared.full(stage);
  ptx::mbarrier_arrive_expect(full, Tile::kStageBytes);
  ptx::load_box(shared.a(stage), &p.a[source], k, m0, full);
  // k major: lines of 64 k, a CTA's share is BLOCK_N / cluster of them. Else boxes of 64 columns.
  const auto rank = static_cast<int32_t>(ptx::cluster_cta_rank());
  const int32_t columns = Tile::BLOCK_N / p.cluster;
  const int32_t boxes = kBKMajor ? 1 : columns / kSwizzledColumns;
  for (int32_t box = 0; box < boxes; ++box) {
    const int32_t column = rank * columns + box * kSwizzledColumns;
    const uint32_t target = shared.b(stage) + column * kLineBytes;
    const int32_t x = kBKMajor ? k : n0 + column, y = kBKMajor ? n0 + column : k;
    if (p.cluster == 1)
      ptx::load_box(target, &p.b[source], x, y, full);
    else
      ptx::load_box_multicast(target, &p.b[source], x, y, full, 3);
  }
}

template <class Tile, bool kBKMajor>
__device__ void produce(const GemmSm90Params& p, const GemmSm90Shared<Tile>& shared) {
  for (int source = 0; source < 2; ++source) {
    ptx::prefetch_tensor_map(&p.a[source]);
    ptx::prefetch_tensor_map(&p.b[source]);
  }
  ptx::prefetch_tensor_map(&p.c);
  RingPlace<Tile::kStages> ring;
  for (TileWalk walk(p); !walk.done(); walk.advance()) {
    int32_t m0, n0;
    walk.place(p, Tile::BLOCK_M, Tile::BLOCK_N, &m0, &n0);
    for (int source = 0; source < 2; ++source) {
      if (source == p.dependent_source) ptx::grid_dependency_wait();
      for (int32_t k = 0; k < p.k[source]; k += Tile::BLOCK_K) {
        ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
        fill_stage<Tile, kBKMajor>(p, shared, ring.stage, source, k, m0, n0);
        ring.advance();
      }
    }
  }
}

// A warp is done with a stage, here and, where others fill it too, there.
template <class Shared>
__device__ inline void release_stage(const Shared& shared, uint32_t stage, int32_t cluster) {
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  if (cluster == 1) {
    if (lane == 0) ptx::mbarrier_arrive(shared.empty(stage));
  } else if (lane < cluster) {
    ptx::mbarrier_arrive_cluster_after_reads(shared.empty(stage), static_cast<uint32_t>(lane));
  }
}

// The products of one tile. mask: null without dropout.
template <class Element, class Tile, bool kBKMajor, bool kMask>
__device__ void multiply_tile(GroupProduct<Element, Tile, kBKMajor>& product,
                              const GemmSm90Params& p, const GemmSm90Shared<Tile>& shared,
                              RingPlace<Tile::kStages>& ring, int row0, const uint32_t* mask) {
  constexpr int kSteps = Tile::BLOCK_K / kWgmmaK;
  bool accumulate = false;
  uint32_t previous = 0;
#pragma unroll 1
  for (int source = 0; source < 2; ++source) {
#pragma unroll 1
    for (int32_t left = p.k[source]; left > 0; left -= Tile::BLOCK_K) {
      ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);
      const uint32_t a = shared.a(ring.stage), b = shared.b(ring.stage);
      if (left > Tile::BLOCK_K - kWgmmaK) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          product.multiply(a, b, row0, step, accumulate || step > 0);
        ptx::wgmma_commit();
      } else {
        // One group a step: ptxas serialises products that some path between fence and commit
        // skips.
#pragma unroll 1
        for (int step = 0; step * kWgmmaK < left; ++step) {
          ptx::wgmma_fence();
          product.multiply(a, b, row0, step, accumulate || step > 0);
          ptx::wgmma_commit();
        }
      }
      product.template wait<1>();
      if (accumulate) release_stage(shared, previous, p.cluster);
      accumulate = true;
      previous = ring.stage;
      ring.advance();
    }
    if (kMask && source == 0) {
      product.template wait<0>();
      mask_accumulators<Tile>(product.acc, mask);
    }
  }
  product.template wait<0>();
  release_stage(shared, previous, p.cluster);
}

template <class Element, class Tile, bool kBKMajor, bool kMask>
__device__ void consume(const GemmSm90Params& p, const GemmSm90Shared<Tile>& shared,
                        unsigned char* dynamic) {
  // The shuffle tells the compiler that a warp's threads agree.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
  const int warp = threadIdx.x / 32 % 4;
  const int row0 = Tile::kPingpong ? 0 : group * Tile::kGroupRows;  // in the tile
  const uint32_t buffers = shared.store_buffers(group * 4 + warp);
  auto* const mask =
      reinterpret_cast<uint32_t*>(dynamic + (buffers - ptx::shared_address(dynamic)));
  const int32_t k_tiles =
      (p.k[0] + Tile::BLOCK_K - 1) / Tile::BLOCK_K + (p.k[1] + Tile::BLOCK_K - 1) / Tile::BLOCK_K;
  RingPlace<Tile::kStages> ring;
  TileWalk walk(p);
  if (Tile::kPingpong && group == 1) {
    walk.advance();
    ring.advance(k_tiles);
  }
  uint32_t next_buffer = 0;
  for (uint32_t turn = 0; !walk.done(); turn ^= 1) {
    int32_t m0, n0;
    walk.place(p, Tile::BLOCK_M, Tile::BLOCK_N, &m0, &n0);
    const int64_t warp_row = int64_t{m0} + row0 + warp * 16;
    if (kMask) {
      if (threadIdx.x % 32 == 0) ptx::bulk_wait_read<0>();
      __syncwarp();
      make_warp_mask<Tile>(p, mask, warp_row, n0);
    }
    // The first warpgroup goes first; each lets the other in when its products are issued.
    if (Tile::kPingpong) ptx::mbarrier_wait(shared.turn(group), turn ^ (group == 0 ? 1 : 0));
    GroupProduct<Element, Tile, kBKMajor> product;
    multiply_tile<Element, Tile, kBKMajor, kMask>(product, p, shared, ring, row0, mask);
    if (Tile::kPingpong) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.turn(1 - group));
      ring.advance(k_tiles);
    }
    store_rows<Element, Tile>(product.acc, p, buffers, next_buffer, warp_row, n0);
    walk.advance(Tile::kPingpong ? 2 : 1);
  }
  if (threadIdx.x % 32 == 0) ptx::bulk_wait_read<0>();
}

// kBKMajor: b is [N, k] of both sources, else [k, N]. kMask: dropout masks the first product.
template <class Element, class Tile, bool kBKMajor, bool kMask>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_dual_sm90_kernel(const __grid_constant__ GemmSm90Params p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  const GemmSm90Shared<Tile> shared(dynamic);
  if (threadIdx.x == 0) shared.init_barriers(static_cast<uint32_t>(p.cluster));
  if (p.cluster > 1)
    ptx::cluster_sync();
  else
    __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_shrink<kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (ptx::elect_one()) produce<Tile, kBKMajor>(p, shared);
      __syncwarp();
    }
  } else {
    ptx::registers_grow<kConsumerRegisters>();
    consume<Element, Tile, kBKMajor, kMask>(p, shared, dynamic);
    __syncwarp();
  }
  // The other CTA still copies into this one's shared memory and arrives at its barriers.
  if (p.cluster > 1) ptx::cluster_sync();
}

}  // namespace fused_peft::cuda
