// The pass over x for sm_90: dlora_a = ds^T (keep x) with x and ds through TMA, M split over a
// cluster.
//
// A cluster owns 64 columns of x, rows of 128 bytes. Its CTAs take every (cluster size)-th block of
// 64 rows. The sums of the warps and of the CTAs meet in
// (distributed) shared memory and are added in a fixed order.
#pragma once

#include "kernels/cuda/lora_backward_sm80.cuh"
#include "kernels/cuda/narrow_sm90.cuh"

namespace fused_peft::cuda {

template <class Factor, int kRank>
struct XPassTile {
  using Narrow = NarrowStage<Factor, kRank>;
  static constexpr int kColumns = kSwizzledColumns;
  static constexpr int kConsumers = 4;  // warps; one more is the producer
  // A warp's 16-column fragments: all of a row, so that each rank's terms are formed once, or half
  // of it, as many as its accumulators have registers for. Then it takes more of the rows.
  static constexpr int kFragments = kRank == 16 ? 4 : 2;
  static constexpr int kWarpColumns = 16 * kFragments;
  static constexpr int kParts = kConsumers * kWarpColumns / kColumns;
  static constexpr int kWarpRows = kSkinnyBlockRows / kParts;
  static constexpr int kThreads = 32 * (kConsumers + 1);
  static constexpr int kNarrowOffset = kSkinnyBlockRows * kColumns * 2;
  static constexpr int kStageBytes = kNarrowOffset + Narrow::kBytes;
  static constexpr int kStages = skinny_stages(kStageBytes);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = skinny_shared_bytes(kStages, kStageBytes);
  // The ring's memory once the last block is consumed: the sums of each part of the rows,
  // [kRank][kColumns], then those of the CTA in the first's place. The ranks 2t of a fragment lie
  // eight banks apart.
  static constexpr int kSumRow = kColumns + 4;
  static constexpr int kSums = kRank * kSumRow;
  static_assert(kParts * kSums * 4 <= kRingBytes);
};

#if __CUDA_ARCH__ >= 900

// The producer: one thread streams this CTA's blocks of rows through the ring.
template <class Tile>
__device__ inline void stream_rows(const SkinnyRing<Tile>& ring, const CUtensorMap* x,
                                   const CUtensorMap* ds, int k0, int blocks) {
  const int ranks = ptx::cluster_cta_count(), first = ptx::cluster_cta_rank();
  const auto load_x = [&](int slot, int block) {
    ptx::mbarrier_arrive_expect(ring.full(slot), Tile::kStageBytes);
    ptx::load_box(ring.stage(slot), x, k0, block * kSkinnyBlockRows, ring.full(slot));
  };
  const auto load_ds = [&](int slot, int block) {
    Tile::Narrow::load(ring.stage(slot) + Tile::kNarrowOffset, ds, block * kSkinnyBlockRows,
                       ring.full(slot));
  };
  // ds is the kernel before's, x is not: the first stages fill with x while that one drains.
  int block = first;
  for (int i = 0; i < Tile::kStages && block < blocks; ++i, block += ranks) load_x(i, block);
  ptx::grid_dependency_wait();
  block = first;
  for (int i = 0; i < Tile::kStages && block < blocks; ++i, block += ranks) load_ds(i, block);
  RingPlace<Tile::kStages> place;
  for (; block < blocks; block += ranks, place.advance()) {
    ptx::mbarrier_wait(ring.empty(place.stage), place.phase);
    load_x(place.stage, block);
    load_ds(place.stage, block);
  }
}

// A consumer: its rows and columns of every block of this CTA's.
template <class Element, class Factor, int kRank>
__device__ inline void multiply_rows_transposed(const XPassParams& p,
                                                const SkinnyRing<XPassTile<Factor, kRank>>& ring,
                                                int k0, int blocks) {
  using Tile = XPassTile<Factor, kRank>;
  constexpr int kFragments = Tile::kFragments;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % Tile::kParts;
  const int row = part * Tile::kWarpRows, column = warp / Tile::kParts * Tile::kWarpColumns;
  const int ranks = ptx::cluster_cta_count();
  const uint32_t x_tile = a_fragment_trans<Tile::kColumns>(column, row, lane);
  const StageMask<Element, Tile::kWarpColumns, Tile::kWarpRows> mask(p.dropout, p.k, row, column,
                                                                     lane);
  float acc[kFragments][kRank / 8][4] = {};
  RingPlace<Tile::kStages> place;
#pragma unroll 1
  for (int block = ptx::cluster_cta_rank(); block < blocks; block += ranks, place.advance()) {
    unsigned char* const stage = ring.memory + place.stage * Tile::kStageBytes;
    ptx::mbarrier_wait(ring.full(place.stage), place.phase);
    if (p.dropout.seed) mask.apply(stage, int64_t{block} * kSkinnyBlockRows * p.k + k0);
#pragma unroll
    for (int k = 0; k < Tile::kWarpRows; k += 16) {
      uint32_t a[kFragments][4];
#pragma unroll
      for (int i = 0; i < kFragments; ++i)
        ptx::ldmatrix_x4_trans(
            a[i], ((ring.stage(place.stage) + x_tile) ^ (i * 32)) + k * (Tile::kColumns * 2));
      multiply_narrow_stage<Element, Factor, kRank>(acc, a, stage + Tile::kNarrowOffset, row + k, 0,
                                                    p.r, lane);
    }
    if (p.dropout.seed) ptx::fence_proxy_async_shared();  // TMA writes next what the mask wrote
    ring.release(place.stage, lane);
  }
  __syncthreads();  // with the producer: the ring is free
  float* const sums = reinterpret_cast<float*>(ring.memory) + part * Tile::kSums + column +
                      lane % 4 * 2 * Tile::kSumRow + lane / 4;
#pragma unroll
  for (int i = 0; i < kFragments; ++i)
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const at = sums + j * 8 * Tile::kSumRow + i * 16 + half * 8;
        at[0] = acc[i][j][2 * half];
        at[Tile::kSumRow] = acc[i][j][2 * half + 1];
      }
}

// From the warps' sums to this CTA's part of the cluster's columns of dlora_a, four at a time: K is
// a multiple of eight.
template <class Element, class Factor, int kRank>
__device__ inline void finish_columns(const XPassParams& p, float* sums, int k0) {
  using Tile = XPassTile<Factor, kRank>;
  constexpr int kQuads = Tile::kColumns / 4;
  const uint32_t quads = p.r * kQuads;
  const auto at = [&](uint32_t quad) {
    return reinterpret_cast<float4*>(sums + quad / kQuads * Tile::kSumRow + quad % kQuads * 4);
  };
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < quads; i += Tile::kThreads) {
    float4* const own = at(i);
    float4 sum = *own;
#pragma unroll
    for (int part = 1; part < Tile::kParts; ++part)
      sum = add_quads(sum, own[part * (Tile::kSums / 4)]);
    *own = sum;
  }
  ptx::cluster_sync();
  const uint32_t ranks = ptx::cluster_cta_count();
  const uint32_t chunk = threadIdx.x / 32 * ranks + ptx::cluster_cta_rank();
#pragma unroll 1
  for (uint32_t i = chunk * 32 + threadIdx.x % 32; i < quads; i += Tile::kThreads * ranks) {
    const int64_t k = k0 + static_cast<int>(i % kQuads * 4);
    if (k >= p.k) continue;
    store_quad(static_cast<Factor*>(p.dlora_a) + static_cast<int64_t>(i / kQuads) * p.k + k,
               add_ranks(static_cast<const float4*>(at(i))));
  }
  ptx::cluster_sync();  // until no CTA reads this one's memory any more
}

#endif

template <class Element, class Factor, int kRank>
__global__ void __launch_bounds__(XPassTile<Factor, kRank>::kThreads, 2)
    x_pass_sm90_kernel(const __grid_constant__ XPassParams p, const __grid_constant__ CUtensorMap x,
                       const __grid_constant__ CUtensorMap ds) {
#if __CUDA_ARCH__ >= 900
  using Tile = XPassTile<Factor, kRank>;
  extern __shared__ unsigned char shared[];
  ptx::grid_dependency_launch();
  if (static_cast<int>(blockIdx.x) >= p.column_blocks) {  // whole clusters of them
    ptx::grid_dependency_wait();
    const int64_t first = static_cast<int64_t>(blockIdx.x) - p.column_blocks;
    reduce_parts<Element>(p.reduce, first * Tile::kThreads + threadIdx.x,
                          (static_cast<int64_t>(gridDim.x) - p.column_blocks) * Tile::kThreads);
    return;
  }
  const SkinnyRing<Tile> ring(shared);
  ring.init();
  const int k0 = static_cast<int>(blockIdx.x / ptx::cluster_cta_count()) * Tile::kColumns;
  const int blocks = static_cast<int>(ceil_div(p.m, kSkinnyBlockRows));
  if (threadIdx.x < 32 * Tile::kConsumers) {
    multiply_rows_transposed<Element, Factor, kRank>(p, ring, k0, blocks);
  } else {
    if (threadIdx.x % 32 == 0) stream_rows<Tile>(ring, &x, &ds, k0, blocks);
    __syncwarp();
    __syncthreads();
  }
  __syncthreads();
  finish_columns<Element, Factor, kRank>(p, reinterpret_cast<float*>(ring.memory), k0);
#endif
}

}  // namespace fused_peft::cuda
