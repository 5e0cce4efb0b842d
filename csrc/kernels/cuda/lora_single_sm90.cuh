// The LoRA layer's forward pass in one launch, and what its backward pass makes of dy in one.
//
//   forward:  y = x W^T + s lora_b^T + bias,  s = scaling x lora_a^T
//   backward: dx = dy W + ds lora_a,  ds = scaling dy lora_b,  dlora_b = dy^T s
//
// Both are c = a b + narrow update with a narrow product of a (s, ds). The tiles of the first
// column of c have the factor's R columns beside W's: they form the narrow product on the way,
// write it and publish it. The other tiles wait for it behind their last k tile. The last product
// takes it from registers, where a tile of the first column has it already. For dlora_b, which two
// warps of every CTA form beside that, see lora_single_dlora_b_sm90.cuh.
//
// In a cluster the two CTAs have row tiles below one another and share the tiles of b and the
// update as in gemm_dual_sm90.cuh. The first one takes the tiles of both.
//
// No deadlock, however few clusters are resident: tiles are taken in order from a counter, those of
// the first column before all others. When a cluster takes another tile, each tile of the first
// column has been taken by a cluster that runs. That cluster finishes it before the tile it took
// next, and nothing it does for it waits for another cluster. So each wait ends.
//
// The cluster that is the last to find no tile left sets the counter back and the epoch on: by then
// all have read both. A launch that follows in the stream finds the state as the first one did, but
// for the epoch.
#pragma once

#include "kernels/cuda/lora_single_consumer_sm90.cuh"
#include "kernels/cuda/lora_single_dlora_b_sm90.cuh"

namespace fused_peft::cuda {

__device__ inline void leave(const LoraSingleParams& p, uint32_t epoch) {
  SingleLaunchState* const state = p.state;
  if (ptx::atomic_add_acq_rel(&state->finished, 1) != gridDim.x / p.cluster - 1) return;
  ptx::store_relaxed(&state->next_tile, 0);
  ptx::store_relaxed(&state->finished, 0);
  ptx::store_relaxed(&state->epoch, epoch + 1);
}

// The cluster's next tile, from the counter to both CTAs. One thread of the first.
template <class Tile>
__device__ inline void send_tile(const LoraSingleParams& p, const LoraSingleShared<Tile>& shared,
                                 const RingPlace<Tile::kTileSlots>& slot) {
  const auto taken = static_cast<int32_t>(ptx::atomic_add_relaxed(&p.state->next_tile, 1));
  const int32_t tile = taken < cluster_rows(p) * p.tiles_n ? taken : -1;
  ptx::mbarrier_wait_cluster(shared.tile_empty(slot.stage), slot.phase ^ 1);
  if (p.cluster > 1)
    ptx::store_async_u32(ptx::cluster_address(shared.tile(slot.stage), 1),
                         static_cast<uint32_t>(tile),
                         ptx::cluster_address(shared.tile_full(slot.stage), 1));
  ptx::store_shared_u32(shared.tile(slot.stage), static_cast<uint32_t>(tile));
  ptx::mbarrier_arrive(shared.tile_full(slot.stage));
}

// BLOCK_N columns of b or of the update, from k and n0 on: in a cluster this CTA's share, to all.
template <class Tile>
__device__ inline void load_b(const LoraSingleParams& p, uint32_t target, const CUtensorMap* map,
                              int32_t k, int32_t n0, uint32_t full) {
  const int32_t columns = Tile::BLOCK_N / p.cluster;
  const int32_t box = Tile::kBKMajor ? columns : kSwizzledColumns;
  const int32_t first = columns * static_cast<int32_t>(ptx::cluster_cta_rank());
  for (int32_t column = first; column < first + columns; column += box) {
    const uint32_t to = target + column * Tile::BLOCK_K * 2;
    const int32_t x = Tile::kBKMajor ? k : n0 + column, y = Tile::kBKMajor ? n0 + column : k;
    if (p.cluster == 1)
      ptx::load_box(to, map, x, y, full);
    else
      ptx::load_box_multicast(to, map, x, y, full, 3);
  }
}

// One thread.
template <class Tile>
__device__ void produce(const LoraSingleParams& p, const LoraSingleShared<Tile>& shared,
                        uint32_t epoch) {
  ptx::prefetch_tensor_map(&p.a);
  ptx::prefetch_tensor_map(&p.b);
  ptx::prefetch_tensor_map(&p.down);
  ptx::prefetch_tensor_map(&p.update);
  ptx::prefetch_tensor_map(&p.c);
  const bool leader = ptx::cluster_cta_rank() == 0;
  RingPlace<Tile::kStages> ring;
  RingPlace<Tile::kTileSlots> slot;
  for (;;) {
    if (leader)
      send_tile(p, shared, slot);
    else
      ptx::mbarrier_arrive_expect(shared.tile_full(slot.stage), 4);
    const int32_t tile = take_tile<Tile, false>(shared, slot);
    if (tile < 0) break;
    int32_t m0, n0;
    place_tile<Tile>(p, tile, &m0, &n0);
    for (int32_t k = 0; k < p.k; k += Tile::BLOCK_K) {
      const uint32_t full = shared.full(ring.stage);
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kStageBytes - (n0 == 0 ? 0 : Tile::kStageBytesDown));
      ptx::load_box(shared.a(ring.stage), &p.a, k, m0, full);
      load_b<Tile>(p, shared.b(ring.stage), &p.b, k, n0, full);
      if (n0 == 0)
        ptx::load_box(shared.down(ring.stage), &p.down, Tile::kBKMajor ? k : 0,
                      Tile::kBKMajor ? 0 : k, full);
      ring.advance();
    }
    ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
    ptx::mbarrier_arrive_expect(shared.full(ring.stage), Tile::kUpdateBytes);
    load_b<Tile>(p, shared.b(ring.stage), &p.update, 0, n0, shared.full(ring.stage));
    ring.advance();
  }
  if (leader) leave(p, epoch);
}

// R a multiple of 8, at most Tile::kDown; rows of all operands multiples of 16 bytes.
template <class Element, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    lora_single_sm90_kernel(const __grid_constant__ LoraSingleParams p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  const LoraSingleShared<Tile> shared(dynamic);
  const uint32_t epoch = ptx::load_relaxed(&p.state->epoch);
  if (threadIdx.x == 0) shared.init_barriers(static_cast<uint32_t>(p.cluster));
  if (p.cluster > 1)
    ptx::cluster_sync();
  else
    __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1;
  if (group < 0) {
    ptx::registers_shrink<Tile::kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (ptx::elect_one()) produce<Tile>(p, shared, epoch);
      __syncwarp();
    }
    if constexpr (Tile::kBackward) {
      const unsigned side = threadIdx.x - 32;
      if (side < 32 * Tile::kSideWarps)
        DLoraBWarps<Element, Tile>{p, shared, dynamic + (shared.s() - ptx::shared_address(dynamic)),
                                   side}
            .run();
    }
  } else {
    ptx::registers_grow<Tile::kConsumerRegisters>();
    LoraSingleConsumer<Element, Tile> consumer{
        p, shared, group, static_cast<int>(threadIdx.x / 32 % 4), epoch, {}};
    consumer.run();
    __syncwarp();
  }
  // The other CTA still copies into this one's shared memory and arrives at its barriers.
  if (p.cluster > 1) ptx::cluster_sync();
}

}  // namespace fused_peft::cuda
