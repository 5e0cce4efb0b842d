// The pass over dy for sm_90: ds = scaling dy lora_b and dlora_b = dy^T s with dy and lora_b
// through TMA, N split over a cluster.
//
// A cluster owns kRows rows of dy. Its CTAs take every (cluster size)-th block of 64 columns. A
// block is multiplied twice while it is in shared memory: as it is with lora_b's rows, into sums of
// ds that meet in distributed shared memory at the end; and transposed with s, into rows of the
// partial dlora_b that are complete.
#pragma once

#include "kernels/cuda/lora_backward_sm80.cuh"
#include "kernels/cuda/narrow_sm90.cuh"
#include "kernels/ptx/warp.cuh"

namespace fused_peft::cuda {

template <class Factor, int kRank, int kTileRows>
struct DyPassTile {
  using Narrow = NarrowStage<Factor, kRank>;
  static constexpr int kRows = kTileRows, kColumns = kSwizzledColumns;
  static constexpr int kConsumers = kColumns / 16;  // warps; one more is the producer
  static constexpr int kThreads = 32 * (kConsumers + 1);
  // The warps split rows or columns of dy between them, and with float32 factors the ranks, so that
  // a factor's terms are formed by one warp, or two, for many fragments of dy.
  static constexpr int kRankParts = sizeof(Factor) == 2 ? 1 : kRank == 64 ? 4 : 2;
  static constexpr int kWarpRanks = kRank / kRankParts, kGroups = kConsumers / kRankParts;
  static constexpr int kRowFragments = kRows / 16 / kGroups;        // of a warp, for ds
  static constexpr int kColumnFragments = kColumns / 16 / kGroups;  // and for dlora_b
  static constexpr int kNarrowOffset = kRows * kColumns * 2;
  static constexpr int kStageBytes = kNarrowOffset + Narrow::kBytes;
  static constexpr int kSBytes = kRows / kSkinnyBlockRows * Narrow::kBytes;
  static constexpr int kStages = skinny_stages(kStageBytes, 8, kSBytes);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = skinny_shared_bytes(kStages, kStageBytes) + kSBytes;
  static constexpr int kDsRow = sum_row(kRank);
  static_assert(kRows % kSkinnyBlockRows == 0 && kStages >= 2);
  static_assert(kRows * kDsRow * 4 <= kRingBytes);
};

#if __CUDA_ARCH__ >= 900

// The producer: one thread streams this CTA's blocks of columns through the ring.
template <class Tile>
__device__ inline void stream_columns(const DyPassParams& p, const SkinnyRing<Tile>& ring,
                                      const CUtensorMap* dy, const CUtensorMap* lora_b, int row0,
                                      int blocks) {
  const int ranks = ptx::cluster_cta_count();
  const uint32_t bytes = p.want_ds ? Tile::kStageBytes : Tile::kNarrowOffset;
  RingPlace<Tile::kStages> place;
  for (int block = ptx::cluster_cta_rank(); block < blocks; block += ranks, place.advance()) {
    const uint32_t stage = ring.stage(place.stage), barrier = ring.full(place.stage);
    ptx::mbarrier_wait(ring.empty(place.stage), place.phase ^ 1);
    ptx::mbarrier_arrive_expect(barrier, bytes);
    ptx::load_box(stage, dy, block * Tile::kColumns, row0, barrier);
    if (p.want_ds)
      Tile::Narrow::load(stage + Tile::kNarrowOffset, lora_b, block * Tile::kColumns, barrier);
  }
}

// The consumers' s: in the factor's type, as PEFT's order of operations rounds it too, laid out
// like a narrow matrix in stages.
template <class Element, class Factor, int kRank, int kRows, int kThreads>
__device__ inline void load_s(const DyPassParams& p, unsigned char* tile, int row0) {
  using Narrow = NarrowStage<Factor, kRank>;
  constexpr int kQuads = kRank / 4;
  for (int i = threadIdx.x; i < kRows * kQuads; i += kThreads) {
    // Bits 0 and 2 of the row swapped: the rows that a phase of the store covers differ in what the
    // swizzle permutes their chunks by.
    const int at = i / kQuads, row = (at & ~7) | (at & 1) << 2 | (at & 2) | (at >> 2 & 1);
    const int column = i % kQuads * 4;
    const float* from = p.s + int64_t{row0 + row} * p.r + column;
    float4 v = {0.f, 0.f, 0.f, 0.f};
    if (row0 + row < p.m) {
      if (p.s_aligned) {
        if (column < p.r) v = __ldg(reinterpret_cast<const float4*>(from));
      } else {
        if (column < p.r) v.x = __ldg(from);
        if (column + 1 < p.r) v.y = __ldg(from + 1);
        if (column + 2 < p.r) v.z = __ldg(from + 2);
        if (column + 3 < p.r) v.w = __ldg(from + 3);
      }
    }
    const int panel = column / Narrow::kPanelColumns, in_panel = column % Narrow::kPanelColumns;
    const int byte = in_panel * int{sizeof(Factor)};
    unsigned char* block =
        tile + row / kSkinnyBlockRows * Narrow::kBytes + panel * Narrow::kPanelBytes;
    unsigned char* const to =
        block + tile_offset<64>(row % kSkinnyBlockRows, byte / 16) + byte % 16;
    using Traits = ElementTraits<Element>;
    if constexpr (sizeof(Factor) == 4)
      *reinterpret_cast<float4*>(to) = v;
    else
      *reinterpret_cast<uint2*>(to) = {Traits::pack(v.x, v.y), Traits::pack(v.z, v.w)};
  }
}

// 16 columns n .. of a block, and a warp's ranks, of the partial dlora_b. N is a multiple of eight,
// R of four.
template <int kBlocks>
__device__ inline void store_part(const DyPassParams& p, float* at, int n, int first,
                                  const float (&acc)[kBlocks][4]) {
  if (n >= p.n) return;
  const bool both = n + 8 < p.n;
  const int eight = 8 * p.r;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (first + j * 8 >= p.r) continue;
    ptx::store_global_v2(at + j * 8, acc[j][0], acc[j][1]);
    if (both) ptx::store_global_v2(at + eight + j * 8, acc[j][2], acc[j][3]);
  }
}

// What a warp adds to in a pass over dy.
template <class Element, class Factor, int kRank, int kTileRows>
struct DyPassWarp {
  using Tile = DyPassTile<Factor, kRank, kTileRows>;
  static constexpr int kRowFragments = Tile::kRowFragments;
  static constexpr int kColumnFragments = Tile::kColumnFragments;
  static constexpr int kBlocks = Tile::kWarpRanks / 8;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32 / Tile::kRankParts;
  const int first = threadIdx.x / 32 % Tile::kRankParts * Tile::kWarpRanks;  // of its ranks
  const int row0 = group * kRowFragments * 16, column0 = group * kColumnFragments * 16;
  const uint32_t rows = a_fragment<Tile::kColumns>(row0, 0, lane);
  const uint32_t columns = a_fragment_trans<Tile::kColumns>(column0, 0, lane);
  float ds[kRowFragments][kBlocks][4] = {};

  __device__ void multiply_lora_b(const DyPassParams& p, uint32_t tile,
                                  const unsigned char* lora_b) {
#pragma unroll
    for (int k = 0; k < Tile::kColumns; k += 16) {
      uint32_t a[kRowFragments][4];
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i)
        ptx::ldmatrix_x4(a[i], ((tile + rows) ^ (k * 2)) + i * (16 * Tile::kColumns * 2));
      multiply_narrow_stage<Element, Factor, kRank>(ds, a, lora_b, k, first, p.r, lane);
    }
  }

  __device__ void multiply_s(const DyPassParams& p, uint32_t tile, const unsigned char* s,
                             float (&acc)[kColumnFragments][kBlocks][4]) const {
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += 16) {
      uint32_t a[kColumnFragments][4];
#pragma unroll
      for (int i = 0; i < kColumnFragments; ++i)
        ptx::ldmatrix_x4_trans(a[i], ((tile + columns) ^ (i * 32)) + row * (Tile::kColumns * 2));
      multiply_narrow_stage<Element, Factor, kRank>(
          acc, a, s + row / kSkinnyBlockRows * Tile::Narrow::kBytes, row % kSkinnyBlockRows, first,
          p.r, lane);
    }
  }

  __device__ void store_ds(float* sums) const {
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
        store_sums(sums + (row0 + i * 16) * Tile::kDsRow, Tile::kDsRow, first + j * 8, ds[i][j],
                   lane);
  }
};

template <class Element, class Factor, int kRank, int kTileRows>
__device__ inline void multiply_columns(
    const DyPassParams& p, const SkinnyRing<DyPassTile<Factor, kRank, kTileRows>>& ring,
    const unsigned char* s_tile, float* parts, int blocks) {
  using Warp = DyPassWarp<Element, Factor, kRank, kTileRows>;
  using Tile = typename Warp::Tile;
  Warp warp;
  const int ranks = ptx::cluster_cta_count();
  RingPlace<Tile::kStages> place;
#pragma unroll 1
  for (int block = ptx::cluster_cta_rank(); block < blocks; block += ranks, place.advance()) {
    const uint32_t tile = ring.stage(place.stage);
    ptx::mbarrier_wait(ring.full(place.stage), place.phase);
    if (p.want_ds)
      warp.multiply_lora_b(p, tile,
                           ring.memory + place.stage * Tile::kStageBytes + Tile::kNarrowOffset);
    float acc[Warp::kColumnFragments][Warp::kBlocks][4] = {};
    if (p.s) warp.multiply_s(p, tile, s_tile, acc);
    ring.release(place.stage, warp.lane);
    if (!p.s) continue;
    const int n = block * Tile::kColumns + warp.column0;
    float* const at = parts + int64_t{n + warp.lane / 4} * p.r + warp.first + warp.lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Warp::kColumnFragments; ++i)
      store_part(p, at + i * 16 * p.r, n + i * 16, warp.first + warp.lane % 4 * 2, acc[i]);
  }
  __syncthreads();  // with the producer: the ring is free
  warp.store_ds(reinterpret_cast<float*>(ring.memory));
}

#endif

template <class Element, class Factor, int kRank, int kTileRows>
__global__ void __launch_bounds__(DyPassTile<Factor, kRank, kTileRows>::kThreads, 2)
    dy_pass_sm90_kernel(const __grid_constant__ DyPassParams p,
                        const __grid_constant__ CUtensorMap dy,
                        const __grid_constant__ CUtensorMap lora_b) {
#if __CUDA_ARCH__ >= 900
  using Tile = DyPassTile<Factor, kRank, kTileRows>;
  extern __shared__ unsigned char shared[];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (static_cast<int>(blockIdx.x) >= p.row_blocks) {  // whole clusters of them
    const int64_t first = static_cast<int64_t>(blockIdx.x) - p.row_blocks;
    copy_factor<Element>(p.copy, first * Tile::kThreads + threadIdx.x,
                         (static_cast<int64_t>(gridDim.x) - p.row_blocks) * Tile::kThreads);
    return;
  }
  const SkinnyRing<Tile> ring(shared, Tile::kSBytes);
  ring.init();
  const int tile = static_cast<int>(blockIdx.x / ptx::cluster_cta_count());
  const int row0 = tile * Tile::kRows;
  const int blocks = static_cast<int>(ceil_div(p.n, Tile::kColumns));
  if (threadIdx.x < 32 * Tile::kConsumers) {
    unsigned char* const s_tile = ring.memory - Tile::kSBytes;
    constexpr int kConsumerThreads = 32 * Tile::kConsumers;
    if (p.s) {
      load_s<Element, Factor, kRank, Tile::kRows, kConsumerThreads>(p, s_tile, row0);
      ptx::barrier_sync(1, kConsumerThreads);
    }
    multiply_columns<Element, Factor, kRank, kTileRows>(
        p, ring, s_tile, p.dlora_b_parts + static_cast<int64_t>(tile) * p.n * p.r, blocks);
  } else {
    if (threadIdx.x % 32 == 0) stream_columns<Tile>(p, ring, &dy, &lora_b, row0, blocks);
    __syncwarp();
    __syncthreads();
  }
  if (p.want_ds)
    finish_rows<Element, kRank, Tile::kRows, Tile::kThreads>(
        reinterpret_cast<float*>(ring.memory),
        {row0, p.m, p.r, p.scaling, p.ds, p.ds_stride, p.terms});
#endif
}

}  // namespace fused_peft::cuda
