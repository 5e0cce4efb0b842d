// The LoRA layer's forward pass in one launch: y = x W^T + s lora_b^T + bias, s = scaling x
// lora_a^T.
//
// The tiles of the first column of y have the rows of lora_a as columns beside W's: they form s on
// the way, write it and publish it. The other tiles wait for it behind their last k tile. The last
// product takes s from registers, where a tile of the first column has it already.
//
// No deadlock, however few CTAs are resident: tiles are taken in order from a counter, those of the
// first column before all others. When a CTA takes another tile, each tile of the first column has
// been taken by a CTA that runs. That CTA finishes it before the tile it took next, and nothing it
// does for it waits for another CTA. So each wait ends.
//
// The CTA that is the last to find no tile left sets the counter back and the epoch on: by then all
// have read both. A launch that follows in the stream finds the state as the first one did, but for
// the epoch.
#pragma once

#include "kernels/cuda/gemm_dual_sm90.cuh"
#include "kernels/cuda/lora_single_params_sm90.h"
#include "kernels/cuda/skinny_sm80.cuh"
#include "kernels/ptx/device_order.cuh"
#include "kernels/ptx/store.cuh"

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
    return base + Tile::kStages * Tile::kStageBytes + warp * 2 * Tile::kStoreBoxBytes;
  }
  __device__ uint32_t full(uint32_t stage) const {
    return base + Tile::kStages * Tile::kStageBytes + Tile::kStoreBytes + 8 * stage;
  }
  __device__ uint32_t empty(uint32_t stage) const { return full(Tile::kStages + stage); }
  __device__ uint32_t tile_full(uint32_t slot) const { return full(2 * Tile::kStages + slot); }
  __device__ uint32_t tile_empty(uint32_t slot) const { return tile_full(Tile::kTileSlots + slot); }
  __device__ uint32_t tile(uint32_t slot) const {
    return tile_full(2 * Tile::kTileSlots) + 4 * slot;
  }
  __device__ void init_barriers() const {
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), Tile::kWarps);
    }
    for (uint32_t slot = 0; slot < Tile::kTileSlots; ++slot) {
      ptx::mbarrier_init(tile_full(slot), 1);
      ptx::mbarrier_init(tile_empty(slot), Tile::kWarps);
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

__device__ inline void leave(SingleLaunchState* state, uint32_t epoch) {
  if (ptx::atomic_add_acq_rel(&state->finished, 1) != gridDim.x - 1) return;
  ptx::store_relaxed(&state->next_tile, 0);
  ptx::store_relaxed(&state->finished, 0);
  ptx::store_relaxed(&state->epoch, epoch + 1);
}

// One thread.
template <class Tile>
__device__ void produce(const LoraSingleParams& p, const LoraSingleShared<Tile>& shared,
                        uint32_t epoch) {
  ptx::prefetch_tensor_map(&p.x);
  ptx::prefetch_tensor_map(&p.weight);
  ptx::prefetch_tensor_map(&p.lora_a);
  ptx::prefetch_tensor_map(&p.lora_b);
  ptx::prefetch_tensor_map(&p.c);
  RingPlace<Tile::kStages> ring;
  RingPlace<Tile::kTileSlots> slot;
  for (;;) {
    const auto taken = static_cast<int32_t>(ptx::atomic_add_relaxed(&p.state->next_tile, 1));
    const int32_t tile = taken < p.tiles_m * p.tiles_n ? taken : -1;
    ptx::mbarrier_wait(shared.tile_empty(slot.stage), slot.phase ^ 1);
    ptx::store_shared_u32(shared.tile(slot.stage), static_cast<uint32_t>(tile));
    ptx::mbarrier_arrive(shared.tile_full(slot.stage));
    slot.advance();
    if (tile < 0) break;
    int32_t m0, n0;
    place_tile<Tile>(p, tile, &m0, &n0);
    const bool first_column = tile < p.tiles_m;
    for (int32_t k = 0; k < p.k; k += Tile::BLOCK_K) {
      const uint32_t full = shared.full(ring.stage);
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(full,
                                  Tile::kStageBytes - (first_column ? 0 : Tile::kStageBytesDown));
      ptx::load_box(shared.a(ring.stage), &p.x, k, m0, full);
      ptx::load_box(shared.b(ring.stage), &p.weight, k, n0, full);
      if (first_column) ptx::load_box(shared.down(ring.stage), &p.lora_a, k, 0, full);
      ring.advance();
    }
    ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
    ptx::mbarrier_arrive_expect(shared.full(ring.stage), Tile::kStageBytesB);
    ptx::load_box(shared.b(ring.stage), &p.lora_b, 0, n0, shared.full(ring.stage));
    ring.advance();
  }
  leave(p.state, epoch);
}

// What a consumer warpgroup accumulates, and its place.
template <class Element, class Tile>
struct LoraSingleConsumer {
  using Product = GroupProduct<Element, Tile, true>;
  const LoraSingleParams& p;
  LoraSingleShared<Tile> shared;
  int group, warp;  // warpgroup of the CTA, warp of the warpgroup
  uint32_t epoch;
  RingPlace<Tile::kStages> ring;
  Product product;
  float down[Tile::kDown / 2];

  __device__ void release(uint32_t stage) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.empty(stage));
  }
  __device__ uint32_t* flag(int32_t m0) const {
    return &p.state->published[m0 / Tile::BLOCK_M][group * 4 + warp];
  }

  template <bool kFirstColumn>
  __device__ void multiply_step(uint32_t stage, int step, bool accumulate) {
    const int row0 = group * 64;
    product.multiply(shared.a(stage), shared.b(stage), row0, step, accumulate);
    if constexpr (kFirstColumn) {
      const uint64_t a = ptx::swizzled_descriptor(
          shared.a(stage) + row0 * kLineBytes + step * kWgmmaK * 2, 16, kPatternBytes);
      const uint64_t b =
          ptx::swizzled_descriptor(shared.down(stage) + step * kWgmmaK * 2, 16, kPatternBytes);
      ptx::Wgmma<Tile::kDown>::template multiply<Product::kIsBFloat16, false>(down, a, b,
                                                                              accumulate);
    }
  }

  // x W^T, and in the first column x lora_a^T. Returns the last stage, which is still in use.
  template <bool kFirstColumn>
  __device__ uint32_t multiply_k() {
    constexpr int kSteps = Tile::BLOCK_K / kWgmmaK;
    bool accumulate = false;
    uint32_t previous = 0;
#pragma unroll 1
    for (int32_t left = p.k; left > 0; left -= Tile::BLOCK_K) {
      ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);
      if (left > Tile::BLOCK_K - kWgmmaK) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          multiply_step<kFirstColumn>(ring.stage, step, accumulate || step > 0);
        ptx::wgmma_commit();
      } else {
#pragma unroll 1
        for (int step = 0; step * kWgmmaK < left; ++step) {
          ptx::wgmma_fence();
          multiply_step<kFirstColumn>(ring.stage, step, accumulate || step > 0);
          ptx::wgmma_commit();
        }
      }
      product.template wait<1>();
      if (accumulate) release(previous);
      accumulate = true;
      previous = ring.stage;
      ring.advance();
    }
    return previous;
  }

  // s of the warp's rows as fragments of the last product's a. First column: out of `down`, which
  // is complete; writes and publishes it.
  __device__ void publish_s(uint32_t (&a)[Tile::kDown / 4], int32_t m0) {
    const int lane = threadIdx.x % 32;
    ptx::wgmma_hold(down);
#pragma unroll
    for (int i = 0; i < Tile::kDown / 4; ++i) {
      // Pair i: columns 8 (i / 2) + ..., rows + 8 (i % 2).
      const int32_t row = m0 + group * 64 + warp * 16 + lane / 4 + i % 2 * 8;
      const int32_t column = i / 2 * 8 + lane % 4 * 2;
      const float s0 = scaled(down[2 * i], p.scaling), s1 = scaled(down[2 * i + 1], p.scaling);
      if (row < p.m && column < p.r)
        ptx::store_global_v2(p.s + int64_t{row} * p.r + column, s0, s1);
      a[i] = ElementTraits<Element>::pack(s0, s1);
    }
    __syncwarp();
    if (lane == 0) ptx::store_release(flag(m0), epoch + 1);
  }
  // The others: waits for it.
  __device__ void fetch_s(uint32_t (&a)[Tile::kDown / 4], int32_t m0) {
    const int lane = threadIdx.x % 32;
    while (ptx::load_acquire(flag(m0)) != epoch + 1) {
    }
#pragma unroll
    for (int i = 0; i < Tile::kDown / 4; ++i) {
      const int32_t row = m0 + group * 64 + warp * 16 + lane / 4 + i % 2 * 8;
      const int32_t column = i / 2 * 8 + lane % 4 * 2;
      float2 s = {0.f, 0.f};
      if (row < p.m && column < p.r)
        s = *reinterpret_cast<const float2*>(p.s + int64_t{row} * p.r + column);
      a[i] = ElementTraits<Element>::pack(s.x, s.y);
    }
  }

  // + s lora_b^T. ceil(R / 16) steps.
  __device__ void multiply_update(const uint32_t (&a)[Tile::kDown / 4]) {
    ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);
#pragma unroll
    for (int step = 0; step < Tile::kDown / kWgmmaK; ++step) {
      if (step > 0 && step * kWgmmaK >= p.r) break;
      const uint32_t fragment[4] = {a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3]};
      const uint64_t b =
          ptx::swizzled_descriptor(shared.b(ring.stage) + step * kWgmmaK * 2, 16, kPatternBytes);
      ptx::wgmma_fence();
      ptx::Wgmma<Tile::BLOCK_N>::template multiply<Product::kIsBFloat16, false>(product.acc[0],
                                                                                fragment, b, true);
      ptx::wgmma_commit();
    }
    product.template wait<0>();
    release(ring.stage);
    ring.advance();
  }

  __device__ void run() {
    const uint32_t buffers = shared.store_buffers(group * 4 + warp);
    RingPlace<Tile::kTileSlots> slot;
    uint32_t next_buffer = 0;
    for (;;) {
      ptx::mbarrier_wait(shared.tile_full(slot.stage), slot.phase);
      const auto tile = static_cast<int32_t>(ptx::load_shared_u32(shared.tile(slot.stage)));
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.tile_empty(slot.stage));
      slot.advance();
      if (tile < 0) break;
      int32_t m0, n0;
      place_tile<Tile>(p, tile, &m0, &n0);
      uint32_t a[Tile::kDown / 4];
      if (tile < p.tiles_m) {
        const uint32_t last = multiply_k<true>();
        product.template wait<0>();
        release(last);
        publish_s(a, m0);
      } else {
        const uint32_t last = multiply_k<false>();
        fetch_s(a, m0);
        product.template wait<0>();
        release(last);
      }
      multiply_update(a);
      store_rows<Element, Tile>(product.acc, p, buffers, next_buffer,
                                int64_t{m0} + group * 64 + warp * 16, n0);
    }
    if (threadIdx.x % 32 == 0) ptx::bulk_wait_read<0>();
  }
};

// R a multiple of 8, at most Tile::kDown; rows of all operands multiples of 16 bytes.
template <class Element, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    lora_single_sm90_kernel(const __grid_constant__ LoraSingleParams p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  const LoraSingleShared<Tile> shared(dynamic);
  const uint32_t epoch = ptx::load_relaxed(&p.state->epoch);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1;
  if (group < 0) {
    ptx::registers_shrink<kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (ptx::elect_one()) produce<Tile>(p, shared, epoch);
      __syncwarp();
    }
  } else {
    ptx::registers_grow<kConsumerRegisters>();
    LoraSingleConsumer<Element, Tile> consumer{
        p, shared, group, static_cast<int>(threadIdx.x / 32 % 4), epoch, {}};
    consumer.run();
    __syncwarp();
  }
}

}  // namespace fused_peft::cuda
