// Parameters of the sm_90a GEMM, and its tiles.
#pragma once

#include <cstdint>

#include "kernels/cuda/philox.cuh"
#include "kernels/cuda/tensor_map.h"

namespace fused_peft::cuda {

struct GemmSm90Params {
  CUtensorMap a[2];  // [M, k] of each source
  CUtensorMap b[2];  // [N, k] or [k, N]
  CUtensorMap c;     // [M, N]
  int32_t k[2] = {0, 0};
  int32_t m = 0, n = 0;
  int32_t tiles_m = 0, tiles_n = 0;
  int32_t raster_rows = 1;       // row tiles (pairs of them in clusters) of a column of the order
  int32_t cluster = 1;           // CTAs, below one another: they share b
  int32_t dependent_source = 2;  // from which source on operands are the previous kernel's output
  Dropout dropout;               // keep * applies to the first source's product
  const void* bias = nullptr;
};

// Pingpong: the two consumer warpgroups work on two tiles, one's epilogue beside the other's main
// loop. Cooperative: on the upper and the lower half of one.
template <int BLOCK_M_, int BLOCK_N_, int kStages_, bool kPingpong_>
struct GemmSm90Tile {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = kSwizzledColumns;
  static constexpr int kStages = kStages_;
  static constexpr bool kPingpong = kPingpong_;
  static constexpr int kConsumerGroups = 2, kThreads = 128 * (1 + kConsumerGroups);
  static constexpr int kGroupRows = kPingpong ? BLOCK_M : BLOCK_M / kConsumerGroups;
  static constexpr int kRowBlocks = kGroupRows / 64;
  // Warps that use a stage.
  static constexpr int kStageWarps = kPingpong ? 4 : 4 * kConsumerGroups;
  static constexpr int kStageBytesA = BLOCK_M * BLOCK_K * 2, kStageBytesB = BLOCK_N * BLOCK_K * 2;
  static constexpr int kStageBytes = kStageBytesA + kStageBytesB;
  static constexpr int kStoreBoxRows = 16, kStoreBoxBytes = kStoreBoxRows * BLOCK_K * 2;
  static constexpr int kStoreBytes = 4 * kConsumerGroups * 2 * kStoreBoxBytes;
  static constexpr int kBarrierBytes = 8 * (2 * kStages + kConsumerGroups);
  // The swizzle needs a base that is a multiple of its 1024-byte pattern.
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kStoreBytes + kBarrierBytes;
  static_assert(kRowBlocks * 64 == kGroupRows && BLOCK_N % kSwizzledColumns == 0);
  static_assert(kRowBlocks * BLOCK_N / 2 <= 128, "accumulators of a thread");
  static_assert(kRowBlocks * 16 * BLOCK_N / 8 <= kStoreBoxBytes, "the mask lies in a store buffer");
  static_assert(kSharedBytes <= 227 * 1024);
};

}  // namespace fused_peft::cuda
