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
  static constexpr int kRoom = kSkinnySharedBytes - kBoxAlignment;
  static constexpr int kMostStages = kRoom / (kStageBytes + 2 * int{sizeof(uint64_t)});
  static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kBoxAlignment + kRingBytes + 2 * kStages * sizeof(uint64_t);
  // The ring's memory once the last block is consumed: the sums of each half of the warps, then
  // those of the CTA in the first's place.
  static constexpr int kSRow = kRank + 8;  // see sum_row
  static constexpr int kHalf = kDownRows * kSRow;
  static_assert(kHalves * kHalf * 4 <= kRingBytes);
  static_assert(kStages >= 3 && kStageBytes % kBoxAlignment == 0);
};

#if __CUDA_ARCH__ >= 900

template <class Element, class Factor, int kRank>
__device__ inline void down_blocks(const LoraDownParams& p, unsigned char* ring, uint32_t full,
                                   uint32_t empty, int64_t row0) {
  using Tile = DownTile<Factor, kRank>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp % Tile::kRowGroups * 16, half = warp / Tile::kRowGroups;
  const int ranks = ptx::cluster_cta_count();
  const int blocks = static_cast<int>(ceil_div(p.k, kSkinnyBlockK));
  constexpr int kWarpK = Tile::kSteps * 16;
  const StageMask<Element, kWarpK, 16> mask(p.dropout, p.k, row, half * kWarpK, lane);
  float acc[kRank / 8][4] = {};
  int slot = 0;
  uint32_t phase = 0;
#pragma unroll 1
  for (int block = ptx::cluster_cta_rank(); block < blocks; block += ranks) {
    unsigned char* const stage = ring + slot * Tile::kStageBytes;
    ptx::mbarrier_wait(full + slot * 8, phase);
    if (p.dropout.seed) mask.apply(stage, row0 * p.k + block * kSkinnyBlockK);
#pragma unroll
    for (int i = 0; i < Tile::kSteps; ++i) {
      const int step = half * Tile::kSteps + i;
      uint32_t a[4];
      ptx::ldmatrix_x4(
          a, ptx::shared_address(stage) + a_fragment<kSkinnyBlockK>(row, step * 16, lane));
      multiply_factor<Element, Factor, kRank>(acc, a, stage + Tile::kFactorOffset, step, 0,
                                              static_cast<int>(p.lora_a.rows), lane);
    }
    if (p.dropout.seed) ptx::fence_proxy_async_shared();  // TMA writes next what the mask wrote
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty + slot * 8);
    if (++slot == Tile::kStages) slot = 0, phase ^= 1;
  }
  __syncthreads();  // with the producer: the ring is free
  float* sums = reinterpret_cast<float*>(ring) + half * Tile::kHalf + row * Tile::kSRow;
#pragma unroll
  for (int j = 0; j < kRank / 8; ++j) store_sums(sums, Tile::kSRow, j * 8, acc[j], lane);
}

// This CTA's part of the cluster's rows of s.
template <class Element, class Tile>
__device__ inline void finish_rows(const LoraDownParams& p, float* sums, int64_t row0) {
  const int r = static_cast<int>(p.lora_a.rows), columns = static_cast<int>(segment_columns(r));
  for (int i = threadIdx.x; i < kDownRows * columns; i += Tile::kThreads) {
    const int at = i / columns * Tile::kSRow + i % columns;
    sums[at] += sums[Tile::kHalf + at];
  }
  ptx::cluster_sync();
  const int rows = kDownRows / static_cast<int>(ptx::cluster_cta_count());
  const int first = rows * static_cast<int>(ptx::cluster_cta_rank());
  for (int i = threadIdx.x; i < rows * columns; i += Tile::kThreads) {
    const int row = first + i / columns, column = i % columns;
    const float s = scaled(add_ranks(sums + row * Tile::kSRow + column), p.scaling);
    const int64_t m = row0 + row;
    if (m >= p.x.rows) continue;
    if (column < r) p.s[m * r + column] = s;
    store_terms<Element>(p.terms, m, r, column, s);
  }
  ptx::cluster_sync();  // until no CTA reads this one's memory any more
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
  const uint32_t unaligned = ptx::shared_address(shared);
  const uint32_t ring = (unaligned + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;
  unsigned char* const stages = shared + (ring - unaligned);
  const uint32_t full = ring + Tile::kRingBytes, empty = full + 8 * Tile::kStages;
  const int ranks = ptx::cluster_cta_count();
  const int row0 = static_cast<int>(blockIdx.x) / ranks * kDownRows;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, Tile::kConsumers);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 32 * Tile::kConsumers) {
    down_blocks<Element, Factor, kRank>(p, stages, full, empty, row0);
  } else {
    if (threadIdx.x % 32 == 0) {
      const int blocks = static_cast<int>(ceil_div(p.k, kSkinnyBlockK));
      int slot = 0;
      uint32_t phase = 0;
      for (int block = ptx::cluster_cta_rank(); block < blocks; block += ranks) {
        const uint32_t stage = ring + slot * Tile::kStageBytes, barrier = full + slot * 8;
        ptx::mbarrier_wait(empty + slot * 8, phase ^ 1);
        ptx::mbarrier_arrive_expect(barrier, Tile::kStageBytes);
        ptx::load_box(stage, &x, block * kSkinnyBlockK, row0, barrier);
        Tile::Stage::load(stage + Tile::kFactorOffset, &lora_a, block * kSkinnyBlockK, barrier);
        if (++slot == Tile::kStages) slot = 0, phase ^= 1;
      }
    }
    __syncwarp();
    __syncthreads();
  }
  __syncthreads();
  finish_rows<Element, Tile>(p, reinterpret_cast<float*>(stages), row0);
#endif
}

}  // namespace fused_peft::cuda
