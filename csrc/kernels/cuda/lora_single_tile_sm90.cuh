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
  __device__ void init_barriers() const {
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), Tile::kWarps + Tile::kSideWarps);
    }
    for (uint32_t slot = 0; slot < Tile::kTileSlots; ++slot) {
      ptx::mbarrier_init(tile_full(slot), 1);
      ptx::mbarrier_init(tile_empty(slot), Tile::kWarps + Tile::kSideWarps);
    }
    ptx::mbarrier_init_fence();
  }
};

// The first column's tiles, then the others down columns of raster_rows, as in TileWalk.
template <class Tile>
__device__ inline void place_tile(const LoraSingleParams& p, int32_t index, int32_t* m0,
                                  int32_t* n0) {
  if (index < p.tiles_m) {
    *m0 = index * Tile::BLOCK_M;
    *n0 = 0;
    return;
  }
  const int32_t columns = p.tiles_n - 1, rest = index - p.tiles_m;
  const int32_t group = rest / (p.raster_rows * columns), first = group * p.raster_rows;
  const int32_t height = min(p.raster_rows, p.tiles_m - first);
  const int32_t inside = rest - first * columns;
  *m0 = (first + inside % height) * Tile::BLOCK_M;
  *n0 = (1 + inside / height) * Tile::BLOCK_N;
}

// What each warp but the producer's does first: the next tile, -1 behind the last.
template <class Tile>
__device__ inline int32_t take_tile(const LoraSingleShared<Tile>& shared,
                                    RingPlace<Tile::kTileSlots>& slot) {
  ptx::mbarrier_wait(shared.tile_full(slot.stage), slot.phase);
  const auto tile = static_cast<int32_t>(ptx::load_shared_u32(shared.tile(slot.stage)));
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.tile_empty(slot.stage));
  slot.advance();
  return tile;
}

}  // namespace fused_peft::cuda
