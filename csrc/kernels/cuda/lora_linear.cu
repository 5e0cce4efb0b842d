#include "kernels/cuda/lora_linear_operands.h"

namespace fused_peft::cuda {

LoraLinearShape shape_of(const LoraLinearParams& p) {
  LoraLinearShape shape;
  shape.m = p.m;
  shape.n = p.n;
  shape.k = p.k;
  shape.r = p.r;
  shape.factor_float = factor_float(p);
  shape.dropout = p.dropout_p > 0.0;
  shape.weight_k_major = weight_k_major(p);
  shape.aligned =
      aligned16(p.x.data, p.x.row_stride, p.k) && aligned_weight(p) && p.n % kChunk == 0;
  shape.lora_a_aligned = rows_of(p.lora_a, p.r, p.k).aligned;
  shape.lora_b_aligned = rows_of(p.lora_b, p.n, p.r).aligned;
  return shape;
}

bool supports(const LoraLinearParams& p) {
  if (p.x.dtype != DType::kBFloat16 && p.x.dtype != DType::kFloat16) return false;
  if (p.lora_a.dtype != p.lora_b.dtype) return false;
  if (p.lora_a.dtype != p.x.dtype && p.lora_a.dtype != DType::kFloat32) return false;
  constexpr int64_t kLargest = 0x7fffffff - 128;  // of K, N: counted in 32 bits inside a row
  return p.r >= 1 && p.r <= kMaxRank && p.n <= kLargest && p.k <= kLargest;
}

}  // namespace fused_peft::cuda
