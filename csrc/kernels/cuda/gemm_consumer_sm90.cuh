// What a consumer warpgroup of the sm_90a GEMM does: wgmma on filled stages, dropout's mask, the
// epilogue. See gemm_dual_sm90.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/gemm_params_sm90.h"
#include "kernels/cuda/philox.cuh"
#include "kernels/ptx/ldmatrix.cuh"
#include "kernels/ptx/tensor_copy.cuh"
#include "kernels/ptx/wgmma.cuh"

namespace fused_peft::cuda {

constexpr uint32_t kLineBytes = 128;                // of a swizzled line
constexpr uint32_t kPatternBytes = 8 * kLineBytes;  // the swizzle repeats
constexpr int kWgmmaK = 16;

// BLOCK_N columns of 64 kRowBlocks rows: of the CTA's tile the half (cooperative) or all
// (pingpong).
template <class Element, class Tile, bool kBKMajor>
struct GroupProduct {
  static constexpr int kRowBlocks = Tile::kRowBlocks, BLOCK_N = Tile::BLOCK_N;
  float acc[kRowBlocks][BLOCK_N / 2];

  // Rows step * 16 .. of k of the tile of b.
  __device__ static uint64_t b_descriptor(uint32_t stage_b, int step) {
    const uint32_t start =
        stage_b + step * (kBKMajor ? kWgmmaK * 2 : kWgmmaK * static_cast<int>(kLineBytes));
    return ptx::swizzled_descriptor(start, Tile::BLOCK_K * kLineBytes, kPatternBytes);
  }

  // One k step of a stage. row0: of this warpgroup in the stage.
  __device__ void multiply(uint32_t stage_a, uint32_t stage_b, int row0, int step,
                           bool accumulate) {
    const uint64_t b = b_descriptor(stage_b, step);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      const uint64_t a = ptx::swizzled_descriptor(
          stage_a + (row0 + 64 * i) * kLineBytes + step * kWgmmaK * 2, 16, kPatternBytes);
      ptx::Wgmma<BLOCK_N>::template multiply<kIsBFloat16, !kBKMajor>(acc[i], a, b, accumulate);
    }
  }

  // Until only the newest kPending groups of products are unfinished.
  template <int kPending>
  __device__ void wait() {
    ptx::wgmma_wait<kPending>();
    if constexpr (kPending == 0) {
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) ptx::wgmma_hold(acc[i]);
    }
  }

  static constexpr bool kIsBFloat16 = std::is_same_v<Element, __nv_bfloat16>;
};

// The keep bits of the 16 rows (of each row block) that a warp accumulates, 32 columns a word, into
// `mask`. Made before the accumulators exist, which leave few registers for Philox.
template <class Tile>
__device__ void make_warp_mask(const GemmSm90Params& p, uint32_t* mask, int64_t row0, int64_t n0) {
  constexpr int kWordsPerRow = Tile::BLOCK_N / 32;
  const uint64_t seed = *p.dropout.seed;
#pragma unroll 1
  for (int word = threadIdx.x % 32; word < Tile::kRowBlocks * 16 * kWordsPerRow; word += 32) {
    const int row = word / kWordsPerRow;
    const auto m = static_cast<uint64_t>(row0 + row / 16 * 64 + row % 16);
    const auto n = static_cast<uint64_t>(n0 + word % kWordsPerRow * 32);
    mask[word] = keep_bits<32>(seed, p.dropout.threshold, m * static_cast<uint64_t>(p.n) + n);
  }
  __syncwarp();
}

// acc *= keep.
template <class Tile>
__device__ void mask_accumulators(float (&acc)[Tile::kRowBlocks][Tile::BLOCK_N / 2],
                                  const uint32_t* mask) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < Tile::BLOCK_N / 8; ++j) {
        const int row = i * 16 + half * 8 + lane / 4;
        const uint32_t keep =
            mask[row * (Tile::BLOCK_N / 32) + j / 4] >> (j % 4 * 8 + lane % 4 * 2);
        if (!(keep & 1)) acc[i][4 * j + 2 * half] = 0.f;
        if (!(keep & 2)) acc[i][4 * j + 2 * half + 1] = 0.f;
      }
}

// Rounds the accumulators (+ bias) once and writes them, 64 columns of a warp's 16 rows at a time:
// each warp fills its own two buffers in turn and copies them out itself, so no warp waits for
// another. row0: of the warp's first row. next: which buffer; goes on from tile to tile.
template <class Element, class Tile, class Params>
__device__ void store_rows(const float (&acc)[Tile::kRowBlocks][Tile::BLOCK_N / 2], const Params& p,
                           uint32_t buffers, uint32_t& next, int64_t row0, int64_t n0) {
  using Traits = ElementTraits<Element>;
  const int lane = threadIdx.x % 32;
  const auto* bias = static_cast<const Element*>(p.bias);
  // Lane l names row l % 8 of matrix l / 8: rows below 8, rows from 8, and the same 8 columns on.
  const uint32_t row_bytes = (lane & 15) * kLineBytes;
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
    for (int part = 0; part < Tile::BLOCK_N / kSwizzledColumns; ++part) {
      const uint32_t buffer = buffers + next * Tile::kStoreBoxBytes;
      next ^= 1;
      if (lane == 0) ptx::bulk_wait_read<1>();
      __syncwarp();
#pragma unroll
      for (int pair = 0; pair < kSwizzledColumns / 16; ++pair) {
        uint32_t words[4];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int j = part * 8 + pair * 2 + side;
          const int64_t n = n0 + j * 8 + lane % 4 * 2;
          float add[2] = {0.f, 0.f};
          if (bias && n < p.n) {
            add[0] = Traits::to_float(bias[n]);
            add[1] = Traits::to_float(bias[n + 1]);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half)
            words[2 * side + half] = Traits::pack(acc[i][4 * j + 2 * half] + add[0],
                                                  acc[i][4 * j + 2 * half + 1] + add[1]);
        }
        const uint32_t chunk = static_cast<uint32_t>(pair * 2 + lane / 16) ^ (lane & 7);
        ptx::stmatrix_x4(buffer + row_bytes + chunk * 16, words);
      }
      ptx::fence_proxy_async_shared();
      __syncwarp();
      if (lane == 0) {
        ptx::store_box(&p.c, static_cast<int32_t>(n0 + part * kSwizzledColumns),
                       static_cast<int32_t>(row0 + i * 64), buffer);
        ptx::bulk_commit();
      }
    }
}

}  // namespace fused_peft::cuda
