// What stands between the adapted layers of a language model and has nothing to train there: root
// mean square norm, gated SiLU, cross-entropy. One pass over memory each, gradients of the
// activations only. Plain structs, no framework, no exceptions.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace fused_peft {

//   y  = x rstd weight,  rstd = 1 / sqrt(mean(x^2) + eps)           [M, H]
//   dx = rstd (g - x rstd^2 mean(g x)),  g = dy weight
// Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
struct RmsNorm {
  int64_t m = 0, h = 0;
  MatrixView x;            // [M, H], col_stride 1
  MatrixView weight;       // [1, H], x's dtype or float
  double eps = 0.0;        // forward
  void* y = nullptr;       // forward: [M, H] contiguous, x's dtype
  double* rstd = nullptr;  // [M]: its rounding to float would be an error of the whole row
  MatrixView dy;           // backward: [M, H], col_stride 1, x's dtype
  void* dx = nullptr;      // backward: [M, H] contiguous, x's dtype
};

//   y = silu(gate) up,  silu(g) = g / (1 + exp(-g))
// Shazeer, "GLU Variants Improve Transformer", 2020.
struct SwiGlu {
  int64_t n = 0;  // elements, all contiguous and of one dtype
  DType dtype = DType::kFloat32;
  const void *gate = nullptr, *up = nullptr;
  void* y = nullptr;         // forward
  const void* dy = nullptr;  // backward
  void *dgate = nullptr, *dup = nullptr;
};

//   loss = lse - logits[label],  lse = log sum exp(logits)          [M]
//   dlogits = dloss (exp(logits - lse) - [column == label])         [M, V]
// Both are 0 where label is ignored.
struct CrossEntropy {
  int64_t m = 0, v = 0;
  MatrixView logits;                // [M, V], col_stride 1
  const int64_t* labels = nullptr;  // [M], within [0, V) or ignore_index
  int64_t ignore_index = -100;
  float* loss = nullptr;         // forward: [M]
  double* lse = nullptr;         // [M]: a float of it would lose a digit of each probability
  const float* dloss = nullptr;  // backward: [M], dloss_stride apart
  int64_t dloss_stride = 1;
  void* dlogits = nullptr;  // backward: [M, V] contiguous, the logits' dtype
};

namespace cpu {

Status rms_norm_forward(const RmsNorm& args, Isa isa, const ParallelFor& parallel);
Status rms_norm_backward(const RmsNorm& args, Isa isa, const ParallelFor& parallel);
Status swiglu_forward(const SwiGlu& args, Isa isa, const ParallelFor& parallel);
Status swiglu_backward(const SwiGlu& args, Isa isa, const ParallelFor& parallel);
Status cross_entropy_forward(const CrossEntropy& args, Isa isa, const ParallelFor& parallel);
Status cross_entropy_backward(const CrossEntropy& args, Isa isa, const ParallelFor& parallel);

}  // namespace cpu
}  // namespace fused_peft
