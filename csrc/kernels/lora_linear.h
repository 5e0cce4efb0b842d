// Fused LoRA linear layer: parameters and launchers. Plain structs, no framework, no exceptions.
//
//   s = scaling * drop(x) lora_a^T                    [M, R]  float
//   y = x weight^T + s lora_b^T + bias                [M, N]
//
//   ds      = scaling / (1 - p) * dy lora_b           [M, R]  float
//   dx      = dy weight + keep * (ds lora_a)          [M, K]
//   dlora_a = ds^T (keep * x)                         [R, K]
//   dlora_b = dy^T s                                  [N, R]
//   dbias   = sum over M of dy                        [N]
//
// Without a weight the product x weight^T is somebody else's, a quantised layer's say, and comes in
// as base: y = base + s lora_b^T, and dx is the low-rank term alone.
//
// keep is the dropout mask, drop(x) = keep * x / (1 - p). The weight is frozen: its gradient is
// never formed. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace fused_peft {

struct LoraLinearParams {
  int64_t m = 0, n = 0, k = 0, r = 0;
  MatrixView x;       // [M, K], col_stride 1
  MatrixView weight;  // [N, K], one of the strides is 1; data is null: see base
  MatrixView lora_a;  // [R, K], col_stride 1
  MatrixView lora_b;  // [N, R], col_stride 1
  MatrixView bias;    // [1, N], data is null without a bias
  double scaling = 1.0;
  double dropout_p = 0.0;  // double: 1 - p loses three digits in float as p nears 1
  uint64_t seed = 0;
};

struct LoraLinearForward {
  LoraLinearParams problem;
  MatrixView base;     // [M, N], x's dtype, col_stride 1; read where there is no weight
  float* s = nullptr;  // [M, R] contiguous, out
  void* y = nullptr;   // [M, N], out, x's dtype
  int64_t y_row_stride = 0;
};

// A null output is not computed.
struct LoraLinearBackward {
  LoraLinearParams problem;
  MatrixView dy;             // [M, N], col_stride 1, x's dtype
  const float* s = nullptr;  // [M, R] contiguous, from the forward pass
  void* dx = nullptr;        // [M, K] contiguous, x's dtype
  void* dlora_a = nullptr;   // [R, K] contiguous, lora_a's dtype
  void* dlora_b = nullptr;   // [N, R] contiguous, lora_b's dtype
  void* dbias = nullptr;     // [N] contiguous, bias's dtype
};

namespace cpu {

// Largest rank with a kernel; see csrc/kernels/cpu/gemm_impl.h for what bounds it.
constexpr int64_t kMaxRank = 512;

Status lora_linear_forward(const LoraLinearForward& args, Isa isa, const ParallelFor& parallel);
Status lora_linear_backward(const LoraLinearBackward& args, Isa isa, const ParallelFor& parallel);

}  // namespace cpu
}  // namespace fused_peft
