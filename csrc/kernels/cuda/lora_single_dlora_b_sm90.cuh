// dlora_b = dy^T s on the way of dx's single launch; see lora_single_sm90.cuh.
//
// Every tile of dx has its rows of dy in shared memory, 64 columns at a time. The tiles of a row of
// tiles share its column blocks: tile i multiplies blocks i, i + tiles_n, ... by s, so that each is
// multiplied once and no tile has more to do than another. Two warps that have no other work do it,
// beside the wgmma of the others; their partial sums over 128 rows are added up by the x pass.
#pragma once

#include "kernels/cuda/lora_backward_sm80.cuh"
#include "kernels/cuda/lora_single_tile_sm90.cuh"
#include "kernels/ptx/warp.cuh"

namespace fused_peft::cuda {

template <class Element, class Tile>
struct DLoraBWarps {
  static constexpr int kThreads = 32 * Tile::kSideWarps;
  static constexpr int kBlocks = Tile::BLOCK_K / 16 / Tile::kSideWarps;  // of 16 columns, a warp's
  static constexpr int kRanks = 16;                                      // at a time
  static constexpr int kBarrier = 1;
  const LoraSingleParams& p;
  LoraSingleShared<Tile> shared;
  unsigned char* s_tile;  // [BLOCK_M][kDown], as fill_narrow would leave it
  unsigned thread;        // among these warps

  // s of the rows from m0 on, rounded as PEFT's order of operations rounds it.
  __device__ void fill_s(int32_t m0) const {
    constexpr int kChunks = Tile::kDown / kChunk, kRows = kThreads / kChunks;  // at a time
    const int first = int(thread / kChunks), chunk = int(thread % kChunks);
    const float* from = p.saved_s + (int64_t{m0} + first) * p.r + chunk * kChunk;
    const int rows = chunk * kChunk < p.r ? p.m - m0 - first : 0;
    const uint32_t target = ptx::shared_address(s_tile);
    ptx::barrier_sync(kBarrier, kThreads);  // the s of the tile before is not used any more
#pragma unroll 4
    for (int row = 0; row < Tile::BLOCK_M; row += kRows, from += kRows * p.r) {
      float4 s[2] = {};
      if (row < rows) {
        s[0] = *reinterpret_cast<const float4*>(from);
        s[1] = *reinterpret_cast<const float4*>(from + 4);
      }
      using Traits = ElementTraits<Element>;
      store_shared(target + tile_offset<Tile::kDown>(first + row, chunk),
                   {Traits::pack(s[0].x, s[0].y), Traits::pack(s[0].z, s[0].w),
                    Traits::pack(s[1].x, s[1].y), Traits::pack(s[1].z, s[1].w)});
    }
    ptx::barrier_sync(kBarrier, kThreads);
  }

  // Ranks first .. first + 15 of this warp's columns of a block of dy.
  __device__ void multiply(uint32_t dy, int32_t column0, int first, float* part) const {
    const int lane = int(thread % 32);
    float acc[kBlocks][kRanks / 8][4] = {};
    // Swizzles repeat after at most 16 rows.
    uint32_t b_row = ptx::shared_address(s_tile) + b_fragment_trans<Tile::kDown>(first, 0, lane);
    uint32_t a_row[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      a_row[i] =
          dy + a_fragment_trans<Tile::BLOCK_K>((int(thread / 32) * kBlocks + i) * 16, 0, lane);
#pragma unroll 2
    for (int row = 0; row < Tile::BLOCK_M; row += 16) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, b_row);
      b_row += 16 * Tile::kDown * 2;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, a_row[i]);
        a_row[i] += 16 * Tile::BLOCK_K * 2;
        mma16<Element>(acc[i][0], a, b[0], b[1]);
        mma16<Element>(acc[i][1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < kRanks / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t column =
              column0 + (int(thread / 32) * kBlocks + i) * 16 + lane / 4 + half * 8;
          const int rank = first + j * 8 + lane % 4 * 2;
          if (column < p.k && rank < p.r)
            ptx::store_global_v2(part + int64_t{column} * p.r + rank, acc[i][j][2 * half],
                                 acc[i][j][2 * half + 1]);
        }
  }

  __device__ void run() const {
    RingPlace<Tile::kStages> ring;
    RingPlace<Tile::kTileSlots> slot;
    for (;;) {
      const int32_t tile = take_tile<Tile, true>(shared, slot);
      if (tile < 0) break;
      int32_t m0, n0;
      place_tile<Tile>(p, tile, &m0, &n0);
      int32_t mine = p.dlora_b_parts && m0 < p.m ? n0 / Tile::BLOCK_N * Tile::BLOCK_K : p.k;
      if (mine < p.k) fill_s(m0);
      float* const part = p.dlora_b_parts + int64_t{m0 / Tile::BLOCK_M} * p.k * p.r;
      // The last stage is the update's.
      for (int32_t k = 0; k < p.k + Tile::BLOCK_K; k += Tile::BLOCK_K) {
        ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (k == mine && k < p.k) {
          for (int first = 0; first < p.r; first += kRanks)
            multiply(shared.a(ring.stage), k, first, part);
          mine += p.tiles_n * Tile::BLOCK_K;
        }
        __syncwarp();
        release_stage(shared, ring.stage, p.cluster);
        ring.advance();
      }
    }
  }
};

}  // namespace fused_peft::cuda
