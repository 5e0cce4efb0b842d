// What a consumer warpgroup of the single launch does; see lora_single_sm90.cuh.
#pragma once

#include "kernels/cuda/lora_single_tile_sm90.cuh"
#include "kernels/cuda/skinny_sm80.cuh"
#include "kernels/ptx/device_order.cuh"
#include "kernels/ptx/store.cuh"

namespace fused_peft::cuda {

// What a consumer warpgroup accumulates, and its place.
template <class Element, class Tile>
struct LoraSingleConsumer {
  using Product = GroupProduct<Element, Tile, Tile::kBKMajor>;
  const LoraSingleParams& p;
  LoraSingleShared<Tile> shared;
  int group, warp;  // warpgroup of the CTA, warp of the warpgroup
  uint32_t epoch;
  RingPlace<Tile::kStages> ring;
  Product product;
  float down[Tile::kDown / 2];

  __device__ void release(uint32_t stage) const { release_stage(shared, stage, p.cluster); }
  __device__ uint32_t* flag(int32_t m0) const {
    return &p.state->published[m0 / Tile::BLOCK_M][group * 4 + warp];
  }

  // One k step of lora_a, whose lines are 64 k, or of lora_b, whose lines are its kDown columns.
  __device__ static uint64_t down_descriptor(uint32_t tile, int step) {
    if constexpr (Tile::kBKMajor)
      return ptx::swizzled_descriptor(tile + step * kWgmmaK * 2, 16, kPatternBytes);
    constexpr int kLine = Tile::kDown * 2;
    return ptx::swizzled_descriptor<kLine>(tile + step * kWgmmaK * kLine, Tile::kStageBytesDown,
                                           8 * kLine);
  }

  template <bool kFirstColumn>
  __device__ void multiply_step(uint32_t stage, int step, bool accumulate) {
    const int row0 = group * 64;
    product.multiply(shared.a(stage), shared.b(stage), row0, step, accumulate);
    if constexpr (kFirstColumn) {
      const uint64_t a = ptx::swizzled_descriptor(
          shared.a(stage) + row0 * kLineBytes + step * kWgmmaK * 2, 16, kPatternBytes);
      ptx::Wgmma<Tile::kDown>::template multiply<Product::kIsBFloat16, !Tile::kBKMajor>(
          down, a, down_descriptor(shared.down(stage), step), accumulate);
    }
  }

  // a b, and in the first column a down. Returns the last stage, which is still in use.
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

  // Pair i of a thread's values of the narrow product: row and (first) column.
  __device__ int32_t pair_row(int i, int32_t m0) const {
    return m0 + group * 64 + warp * 16 + static_cast<int32_t>(threadIdx.x % 32 / 4) + i % 2 * 8;
  }
  __device__ static int32_t pair_column(int i) {
    return i / 2 * 8 + static_cast<int32_t>(threadIdx.x % 4 * 2);
  }
  __device__ uint32_t* ds_pair(int32_t row, int32_t column) const {
    return reinterpret_cast<uint32_t*>(static_cast<Element*>(p.ds) + int64_t{row} * p.ds_stride +
                                       column);
  }

  // The narrow product of the warp's rows as fragments of the last product's a. First column: out
  // of `down`, which is complete; writes and publishes it.
  __device__ void publish_narrow(uint32_t (&a)[Tile::kDown / 4], int32_t m0) {
    ptx::wgmma_hold(down);
#pragma unroll
    for (int i = 0; i < Tile::kDown / 4; ++i) {
      const int32_t row = pair_row(i, m0), column = pair_column(i);
      const float v0 = scaled(down[2 * i], p.scaling), v1 = scaled(down[2 * i + 1], p.scaling);
      a[i] = ElementTraits<Element>::pack(v0, v1);
      if constexpr (Tile::kBackward) {
        if (row < p.m && column < p.ds_stride) *ds_pair(row, column) = a[i];
      } else {
        if (row < p.m && column < p.r)
          ptx::store_global_v2(p.s + int64_t{row} * p.r + column, v0, v1);
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::store_release(flag(m0), epoch + 1);
  }
  // The others: waits for it.
  __device__ void fetch_narrow(uint32_t (&a)[Tile::kDown / 4], int32_t m0) {
    while (ptx::load_acquire(flag(m0)) != epoch + 1) {
    }
#pragma unroll
    for (int i = 0; i < Tile::kDown / 4; ++i) {
      const int32_t row = pair_row(i, m0), column = pair_column(i);
      const bool exists = row < p.m && column < p.r;
      if constexpr (Tile::kBackward) {
        a[i] = exists ? *ds_pair(row, column) : 0;
      } else {
        float2 s = {0.f, 0.f};
        if (exists) s = *reinterpret_cast<const float2*>(p.s + int64_t{row} * p.r + column);
        a[i] = ElementTraits<Element>::pack(s.x, s.y);
      }
    }
  }

  // + narrow update. ceil(R / 16) steps.
  __device__ void multiply_update(const uint32_t (&a)[Tile::kDown / 4]) {
    ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);
#pragma unroll
    for (int step = 0; step < Tile::kDown / kWgmmaK; ++step) {
      if (step > 0 && step * kWgmmaK >= p.r) break;
      const uint32_t fragment[4] = {a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3]};
      ptx::wgmma_fence();
      ptx::Wgmma<Tile::BLOCK_N>::template multiply<Product::kIsBFloat16, !Tile::kBKMajor>(
          product.acc[0], fragment, Product::b_descriptor(shared.b(ring.stage), step), true);
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
      const int32_t tile = take_tile<Tile, true>(shared, slot);
      if (tile < 0) break;
      int32_t m0, n0;
      place_tile<Tile>(p, tile, &m0, &n0);
      uint32_t a[Tile::kDown / 4];
      if (tile < cluster_rows(p)) {
        const uint32_t last = multiply_k<true>();
        product.template wait<0>();
        release(last);
        publish_narrow(a, m0);
      } else {
        const uint32_t last = multiply_k<false>();
        fetch_narrow(a, m0);
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

}  // namespace fused_peft::cuda
