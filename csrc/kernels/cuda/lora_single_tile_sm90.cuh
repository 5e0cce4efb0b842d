// Shared memory and the tiles of the single launch; see lora_single_sm90.cuh.
#pragma once

#include "kernels/cuda/gemm_dual_sm90.cuh"
#include "kernels/cuda/lora_single_params_sm90.h"

namespace fused_peft::cuda {

template <class Tile>
struct LoraSingleShared {
  uint32_t base;

  __device__ explicit LoraSingleShared(const void* dynamic)
      : base((ptx::shared_address(dynamic) + kPatternBytes - 1) / kPatternBytes * kPatternBytes) {}
  __device__ uint32_t a(uint32_t stage) const { return base + stage * Tile::kStageBytes; }
  __device__ uint32_t b(uint32_t stage) const { return a(stage) + Tile::kStageBytesA; }
  __device__ uint32_t down(uint32_t stage) const { return b(stage) + Tile::kStageBytesB; }
  __device__ uint32_t store_buffers(int warp) const {
    return a(Tile::kStages) + warp * 2 * Tile::kStoreBoxBytes;
  }
  __device__ uint32_t s() const { return a(Tile::kStages) + Tile::kStoreBytes; }
  __device__ uint32_t full(uint32_t stage) const { return s() + Tile::kSBytes + 8 * stage; }
  __device__ uint32_t empty(uint32_t stage) const { return full(Tile::kStages + stage); }
  __device__ uint32_t tile_full(uint32_t slot) const { return full(2 * Tile::kStages + slot); }
  __device__ uint32_t tile_empty(uint32_t slot) const { return tile_full(Tile::kTileSlots + slot); }
  __device__ uint32_t tile(uint32_t slot) const {
    return tile_full(2 * Tile::kTileSlots) + 4 * slot;
  }
  // cluster: CTAs whose warps use each other's stages, and the tiles that the first one takes.
  __device__ void init_barriers(uint32_t cluster) const {
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), (Tile::kWarps + Tile::kSideWarps) * cluster);
    }
    for (uint32_t slot = 0; slot < Tile::kTileSlots; ++slot) {
      ptx::mbarrier_init(tile_full(slot), 1);
      ptx::mbarrier_init(tile_empty(slot), (Tile::kWarps + Tile::kSideWarps + 1) * cluster);
    }
    ptx::mbarrier_init_fence();
  }
};

// Rows of tiles that a cluster takes at once.
__device__ inline int32_t cluster_rows(const LoraSingleParams& p) {
  return (p.tiles_m + p.cluster - 1) / p.cluster;
}

// The first column's tiles, then the others down columns of raster_rows, as in TileWalk.
template <class Tile>
__device__ inline void place_tile(const LoraSingleParams& p, int32_t index, int32_t* m0,
                                  int32_t* n0) {
  const int32_t rows = cluster_rows(p);
  int32_t row = index, column = 0;
  if (index >= rows) {
    const int32_t columns = p.tiles_n - 1, rest = index - rows;
    const int32_t group = rest / (p.raster_rows * columns), first = group * p.raster_rows;
    const int32_t height = min(p.raster_rows, rows - first);
    const int32_t inside = rest - first * columns;
    row = first + inside % height;
    column = 1 + inside / height;
  }
  *m0 = (row * p.cluster + static_cast<int32_t>(ptx::cluster_cta_rank())) * Tile::BLOCK_M;
  *n0 = column * Tile::BLOCK_N;
}

// What every warp does first, the producer's by one thread: the next tile, -1 behind the last.
template <class Tile, bool kWholeWarp>
__device__ inline int32_t take_tile(const LoraSingleShared<Tile>& shared,
                                    RingPlace<Tile::kTileSlots>& slot) {
  ptx::mbarrier_wait(shared.tile_full(slot.stage), slot.phase);
  const auto tile = static_cast<int32_t>(ptx::load_shared_u32(shared.tile(slot.stage)));
  if (kWholeWarp) __syncwarp();
  if (!kWholeWarp || threadIdx.x % 32 == 0)
    ptx::mbarrier_arrive_cluster_after_reads(shared.tile_empty(slot.stage), 0);
  slot.advance();
  return tile;
}

}  // namespace fused_peft::cuda
