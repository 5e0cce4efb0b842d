// lora_down for sm_90: s = scaling drop(x) lora_a^T with x and lora_a through TMA, k split over a
// cluster.
//
// A cluster owns kDownRows rows of x: four times what a CTA of the sm_80 kernel has, so lora_a is
// read a quarter as often. Each of its CTAs takes every (cluster size)-th k-block; their sums meet
// in distributed shared memory, each CTA finishing its part of the rows in the order of the ranks.
#pragma once

#include "kernels/cuda/lora_down_sm80.cuh"
#include "kernels/cuda/skinny_sm90.cuh"

namespace fused_peft::cuda {

template <class Factor, int kRank>
struct DownTile {
  using Stage = FactorStage<Factor, kRank>;
  static constexpr int kConsumers = 8;  // warps: four of rows, by two of k
  static constexpr int kRowGroups = kDownRows / 16, kHalves = kConsumers / kRowGroups;
  static constexpr int kSteps = kSkinnyBlockK / 16 / kHalves;  // k16 steps of a warp in a block
  static constexpr int kThreads = 32 * (kConsumers + 1);
  static constexpr int kFactorOffset = kDownRows * kSkinnyBlockK * 2;
  static constexpr int kStageBytes = kFactorOffset + Stage::kBytes;
  static constexpr int kStages = skinny_stages(kStageBytes);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = skinny_shared_bytes(kStages, kStageBytes);
  // The ring's memory once the last block is consumed: the sums of each half of the warps, then
  // those of the CTA in the first's place.
  static constexpr int kSRow = sum_row(kRank);
  static constexpr int kHalf = kDownRows * kSRow;
  static_assert(kHalves == 2 && kHalves * kHalf * 4 <= kRingBytes);
  static_assert(kStages >= 3 && kStageBytes % kBoxAlignment == 0);
};

#if __CUDA_ARCH__ >= 900

// The producer: one thread streams this CTA's k-blocks through the ring.
template <class Tile>
__device__ inline void stream_down(const SkinnyRing<Tile>& ring, const CUtensorMap* x,
                                   const CUtensorMap* lora_a, int row0, int blocks) {
  const int ranks = ptx::cluster_cta_count();
  RingPlace<Tile::kStages> place;
  for (int block = ptx::cluster_cta_rank(); block < blocks; block += ranks, place.advance()) {
    const uint32_t stage = ring.stage(place.stage), barrier = ring.full(place.stage);
    const int k = block * kSkinnyBlockK;
    ptx::mbarrier_wait(ring.empty(place.stage), place.phase ^ 1);
    ptx::mbarrier_arrive_expect(barrier, Tile::kStageBytes);
    ptx::load_box(stage, x, k, row0, barrier);
    Tile::Stage::load(stage + Tile::kFactorOffset, lora_a, k, barrier);
  }
}

template <class Element, class Factor, int kRank>
__device__ inline void multiply_down(const LoraDownParams& p,
                                     const SkinnyRing<DownTile<Factor, kRank>>& ring, int64_t row0,
                                     int blocks) {
  using Tile = DownTile<Factor, kRank>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp % Tile::kRowGroups * 16, half = warp / Tile::kRowGroups;
  const int ranks = ptx::cluster_cta_count();
  constexpr int kWarpK = Tile::kSteps * 16;
  const StageMask<Element, kWarpK, 16> mask(p.dropout, p.k, row, half * kWarpK, lane);
  float acc[kRank / 8][4] = {};
  RingPlace<Tile::kStages> place;
#pragma unroll 1
  for (int block = ptx::cluster_cta_rank(); block < blocks; block += ranks, place.advance()) {
    unsigned char* const stage = ring.memory + place.stage * Tile::kStageBytes;
    ptx::mbarrier_wait(ring.full(place.stage), place.phase);
    if (p.dropout.seed) mask.apply(stage, row0 * p.k + block * kSkinnyBlockK);
#pragma unroll
    for (int i = 0; i < Tile::kSteps; ++i) {
      const int step = half * Tile::kSteps + i;
      uint32_t a[4];
      ptx::ldmatrix_x4(a,
                       ring.stage(place.stage) + a_fragment<kSkinnyBlockK>(row, step * 16, lane));
      multiply_factor<Element, Factor, kRank>(acc, a, stage + Tile::kFactorOffset, step, 0,
                                              static_cast<int>(p.lora_a.rows), lane);
    }
    if (p.dropout.seed) ptx::fence_proxy_async_shared();  // TMA writes next what the mask wrote
    ring.release(place.stage, lane);
  }
  __syncthreads();  // with the producer: the ring is free
  float* sums = reinterpret_cast<float*>(ring.memory) + half * Tile::kHalf + row * Tile::kSRow;
#pragma unroll
  for (int j = 0; j < kRank / 8; ++j) store_sums(sums, Tile::kSRow, j * 8, acc[j], lane);
}

// The sums of both halves of the warps, in the place of the first's.
template <class Tile, int kRank>
__device__ inline void add_halves(float* sums) {
  constexpr int kQuads = kRank / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < kDownRows * kQuads; i += Tile::kThreads) {
    const int row = kRank == 16 ? paired_row(i / kQuads) : i / kQuads;
    auto* const at = reinterpret_cast<float4*>(sums + row * Tile::kSRow) + i % kQuads;
    *at = add_quads(*at, at[Tile::kHalf / 4]);
  }
}

#endif

template <class Element, class Factor, int kRank>
__global__ void __launch_bounds__(DownTile<Factor, kRank>::kThreads, 2)
    lora_down_sm90_kernel(const __grid_constant__ LoraDownParams p,
                          const __grid_constant__ CUtensorMap x,
                          const __grid_constant__ CUtensorMap lora_a) {
#if __CUDA_ARCH__ >= 900
  using Tile = DownTile<Factor, kRank>;
  extern __shared__ unsigned char shared[];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (static_cast<int>(blockIdx.x) >= p.row_blocks) {  // whole clusters of them
    const int64_t first = static_cast<int64_t>(blockIdx.x) - p.row_blocks;
    copy_factor<Element>(p.copy, first * Tile::kThreads + threadIdx.x,
                         (static_cast<int64_t>(gridDim.x) - p.row_blocks) * Tile::kThreads);
    return;
  }
  const SkinnyRing<Tile> ring(shared);
  ring.init();
  const int row0 = static_cast<int>(blockIdx.x / ptx::cluster_cta_count()) * kDownRows;
  const int blocks = static_cast<int>(ceil_div(p.k, kSkinnyBlockK));
  if (threadIdx.x < 32 * Tile::kConsumers) {
    multiply_down<Element, Factor, kRank>(p, ring, row0, blocks);
  } else {
    if (threadIdx.x % 32 == 0) stream_down<Tile>(ring, &x, &lora_a, row0, blocks);
    __syncwarp();
    __syncthreads();
  }
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(ring.memory);
  add_halves<Tile, kRank>(sums);
  const int r = static_cast<int>(p.lora_a.rows);
  finish_rows<Element, kRank, kDownRows, Tile::kThreads>(
      sums, {row0, p.x.rows, r, p.scaling, p.s, r, p.terms});
#endif
}

}  // namespace fused_peft::cuda
