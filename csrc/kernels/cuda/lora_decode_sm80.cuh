// The whole layer for at most 16 tokens in one launch: W is read once, and is nearly all there is
// to read.
//
// Each CTA takes kDecodeColumns rows of W and all of lora_a, its warps split k. Reading lora_a
// again in each CTA comes from L2 and costs R / kDecodeColumns of W's traffic there; a second
// launch would cost more than the layer.
#pragma once

#include "kernels/cuda/lora_linear_config.h"
#include "kernels/cuda/skinny_sm80.cuh"

namespace fused_peft::cuda {

struct LoraDecodeParams {
  int64_t k = 0, n = 0;
  SkinnyRows x, weight, lora_a;
  const void* lora_b = nullptr;  // [N, R], rows contiguous
  int64_t lora_b_stride = 0;
  double scaling = 0.0;
  const void* bias = nullptr;
  float* s = nullptr;  // [M, R]
  void* y = nullptr;   // [M, N]
  int64_t y_stride = 0;
};

// Two CTAs per SM leave 128 registers a thread, too few for the three-part products of 64 float32
// columns.
template <class Factor, int kRank>
constexpr int kDecodeCtasPerSm = sizeof(Factor) == 4 && kRank > 16 ? 1 : 2;

template <class Element, class Factor, int kRank>
__global__ void __launch_bounds__(kSkinnyThreads, kDecodeCtasPerSm<Factor, kRank>)
    lora_decode_kernel(const LoraDecodeParams p) {
  using Traits = ElementTraits<Element>;
  __shared__ float sums[kSkinnyWarps * kSkinnyRows * sum_row(64)];
  __shared__ float s[kSkinnyRows][kRank + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kDecodeColumns;
  float y_acc[kDecodeColumns / 8][4] = {}, s_acc[kRank / 8][4] = {};
  int64_t k = warp * kSkinnyStep + lane % 4 * kChunk;
#pragma unroll 1
  for (; k - lane % 4 * kChunk < p.k; k += kSkinnyWarps * kSkinnyStep) {
    RowPair<Element> x;
    x.load(p.x, 0, k, p.k, lane);
    multiply_rows<Element, Element>(y_acc, x, p.weight, n0, k, p.k, lane);
    multiply_rows<Element, Factor>(s_acc, x, p.lora_a, 0, k, p.k, lane);
  }
  const int r = static_cast<int>(p.lora_a.rows);
  add_warps(s_acc, sums, r, [&](int row, int column, float sum) {
    s[row][column] = scaled(sum, p.scaling);
    if (blockIdx.x == 0 && row < p.x.rows) p.s[row * r + column] = s[row][column];
  });
  add_warps(y_acc, sums, kDecodeColumns, [&](int row, int column, float sum) {
    const int64_t n = n0 + column;
    if (row >= p.x.rows || n >= p.n) return;
    const auto* factor = static_cast<const Factor*>(p.lora_b) + n * p.lora_b_stride;
    for (int i = 0; i < r; ++i) {
      if constexpr (sizeof(Factor) == 2)
        sum += s[row][i] * Traits::to_float(factor[i]);
      else
        sum += s[row][i] * factor[i];
    }
    if (p.bias) sum += Traits::to_float(static_cast<const Element*>(p.bias)[n]);
    static_cast<Element*>(p.y)[row * p.y_stride + n] = Traits::from_float(sum);
  });
}

}  // namespace fused_peft::cuda
