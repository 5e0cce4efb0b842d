// Which kernels and tiles a LoRA layer gets on a device: a pure function of the problem and the
// device, testable without either.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

namespace fused_peft::cuda {

struct LoraLinearShape {
  int64_t m = 0, n = 0, k = 0, r = 0;
  bool factor_float = false;  // lora_a, lora_b are float32, not x's dtype
  bool dropout = false;
  bool weight_k_major = true;  // weight [N, K] with K contiguous; else N contiguous
  bool aligned = true;         // rows of x, weight and y are 16-byte aligned and whole
};

enum class ForwardPath : int32_t {
  kDecode = 0,     // one launch, W streamed once
  kFusedDown = 1,  // one launch, every CTA forms its own rows of s
  kTwoLaunches = 2,
};

constexpr int64_t kDecodeMaxTokens = 16;
constexpr int64_t kFusedMaxRank =
    64;  // larger ranks would double the tensor-core work of a 64-column tile
constexpr int64_t kMaxRank = 256;

struct GemmChoice {
  int32_t block = 0;  // BLOCK_M = BLOCK_N
  int64_t tiles = 0;
};

struct SkinnyChoice {
  int32_t rank = 0;        // columns of the accumulators, R rounded up to a tile that is compiled
  int32_t row_blocks = 0;  // dy pass: 16-row blocks per CTA
  int64_t ctas = 0;
  int32_t rank_blocks = 1;  // x pass: how often x is read
};

struct LoraLinearPlan {
  ForwardPath forward = ForwardPath::kTwoLaunches;
  int32_t forward_launches = 0, backward_launches = 0;
  GemmChoice gemm, gemm_backward;
  SkinnyChoice down, dy_pass, x_pass;
};

constexpr int32_t rank_tile(int64_t r, int32_t largest) {
  return r <= 16 ? 16 : r <= 64 ? 64 : largest;
}

// 128 x 128 tiles move half the bytes of 64 x 64 ones per FLOP, but only pay when there is one for
// every SM.
constexpr GemmChoice choose_gemm(int64_t m, int64_t n, bool aligned, const DeviceFacts& device) {
  const int64_t large = ceil_div(m, 128) * ceil_div(n, 128);
  if (aligned && large >= device.num_sms) return {128, large};
  return {64, ceil_div(m, 64) * ceil_div(n, 64)};
}

constexpr ForwardPath choose_forward(const LoraLinearShape& p, const DeviceFacts& device) {
  if (p.dropout || !p.weight_k_major || p.r > kFusedMaxRank) return ForwardPath::kTwoLaunches;
  if (p.m <= kDecodeMaxTokens) return ForwardPath::kDecode;
  // The extra columns of a fused CTA cost R / 64 of its work. That is cheaper than a launch only
  // while the GEMM is itself no longer than a launch: one wave of tiles with a narrow output (k and
  // v projections).
  const int64_t tiles = ceil_div(p.m, 64) * ceil_div(p.n, 64);
  if (!p.factor_float && p.n <= 512 && tiles <= device.num_sms) return ForwardPath::kFusedDown;
  return ForwardPath::kTwoLaunches;
}

// Rows of dy per CTA: many, since each CTA writes a partial dlora_b; few where there would be too
// few CTAs to fill half the device.
constexpr SkinnyChoice choose_dy_pass(int64_t m, int64_t r, bool factor_float,
                                      const DeviceFacts& device) {
  const int32_t tile = rank_tile(r, 256);
  int32_t blocks = tile == 16 ? 4 : tile == 64 ? (factor_float ? 2 : 4) : 1;
  if (tile == 16 && 2 * ceil_div(m, 64) < device.num_sms) blocks = 1;
  return {tile, blocks, ceil_div(m, 16 * blocks), 1};
}

constexpr LoraLinearPlan plan_lora_linear(const LoraLinearShape& p, const DeviceFacts& device) {
  LoraLinearPlan plan;
  plan.forward = choose_forward(p, device);
  plan.forward_launches = plan.forward == ForwardPath::kTwoLaunches ? 2 : 1;
  plan.gemm = plan.forward == ForwardPath::kFusedDown ? choose_gemm(p.m, p.n, false, device)
                                                      : choose_gemm(p.m, p.n, p.aligned, device);
  plan.gemm_backward = choose_gemm(p.m, p.k, p.aligned, device);
  plan.down = {rank_tile(p.r, 256), 1, ceil_div(p.m, 16), 1};
  plan.dy_pass = choose_dy_pass(p.m, p.r, p.factor_float, device);
  const int32_t x_rank = rank_tile(p.r, 128);
  plan.x_pass = {x_rank, 0, ceil_div(p.k, 32), static_cast<int32_t>(ceil_div(p.r, x_rank))};
  plan.backward_launches = 3;
  return plan;
}

}  // namespace fused_peft::cuda
