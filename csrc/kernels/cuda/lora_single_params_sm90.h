// Parameters of the LoRA layer's forward and backward pass in a single launch (sm_90a), and what
// lasts from one launch to the next.
#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_params_sm90.h"
#include "kernels/cuda/lora_linear_config.h"

namespace fused_peft::cuda {

// In device memory, zero before the first launch. Launches that share one run after one another.
struct SingleLaunchState {
  uint32_t next_tile = 0;
  uint32_t finished = 0;  // CTAs
  uint32_t epoch = 0;     // launches that are complete
  uint32_t unused = 0;
  // Of each row tile, of each warp that accumulates 16 of its rows: epoch + 1 when the narrow
  // product is there. Never cleared: the next launch waits for another value.
  uint32_t published[kSingleLaunchRowTiles][8];
};
static_assert(sizeof(SingleLaunchState) <= kSingleLaunchStateBytes);

// c [M, n] = a b + narrow update, narrow [M, R] = scaling a down.
struct LoraSingleParams {
  // Forward: x, W, lora_a, lora_b, y. Backward: dy, W, lora_b, lora_a, dx.
  CUtensorMap a, b, down, update, c;
  int32_t m = 0, n = 0, k = 0, r = 0;
  int32_t tiles_m = 0, tiles_n = 0;
  int32_t raster_rows = 1;  // row tiles (pairs of them in clusters) of a column of the order
  int32_t cluster = 1;      // CTAs, below one another: they share b
  double scaling = 1.0;
  const void* bias = nullptr;
  float* s = nullptr;  // [M, R], forward only
  // Backward only.
  const float* saved_s = nullptr;  // [M, R]
  void* ds = nullptr;              // [M, ds_stride] in 16 bits, columns from R on zero
  int32_t ds_stride = 0;
  float* dlora_b_parts = nullptr;  // [tiles_m, k, R]; null: dlora_b is not wanted
  SingleLaunchState* state = nullptr;
};

template <int BLOCK_N_, int kStages_, int kDown_, bool kBackward_>
struct LoraSingleTile {
  static constexpr int BLOCK_M = kSingleLaunchRows, BLOCK_N = BLOCK_N_;
  static constexpr int BLOCK_K = kSwizzledColumns;
  static constexpr int kStages = kStages_;
  static constexpr int kDown = kDown_;  // columns of the narrow product, R rounded up
  static constexpr bool kBackward = kBackward_;
  // W [N, K] has its rows contiguous, and is reduced over K forward, over N backward; so are the
  // factors.
  static constexpr bool kBKMajor = !kBackward;
  static constexpr int kRowBlocks = 1, kWarps = 8, kThreads = 384;
  static constexpr int kSideWarps = kBackward ? 2 : 0;  // form dlora_b
  // Of 65,536; beside 128 accumulators of 256 columns a consumer holds the narrow product's.
  static constexpr int kProducerRegisters = kBackward ? 72 : 40;
  static constexpr int kConsumerRegisters = kBackward ? 216 : 232;
  static constexpr int kStageBytesA = BLOCK_M * BLOCK_K * 2, kStageBytesB = BLOCK_N * BLOCK_K * 2;
  static constexpr int kStageBytesDown = kDown * BLOCK_K * 2;
  static constexpr int kStageBytes = kStageBytesA + kStageBytesB + kStageBytesDown;
  static constexpr int kUpdateBytes = kBKMajor ? kStageBytesB : BLOCK_N * kDown * 2;
  static constexpr int kStoreBoxRows = 16, kStoreBoxBytes = kStoreBoxRows * BLOCK_K * 2;
  static constexpr int kStoreBytes = kWarps * 2 * kStoreBoxBytes;
  static constexpr int kSBytes = kBackward ? BLOCK_M * kDown * 2 : 0;
  static constexpr int kTileSlots = 2;
  static constexpr int kBarrierBytes = 8 * 2 * (kStages + kTileSlots) + 4 * kTileSlots;
  static constexpr int kSharedBytes =
      1024 + kStages * kStageBytes + kStoreBytes + kSBytes + kBarrierBytes;
  static_assert(kStageBytesDown % 1024 == 0 && kSharedBytes <= 227 * 1024);
};

}  // namespace fused_peft::cuda
