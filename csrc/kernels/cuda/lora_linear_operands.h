// The operands of the LoRA layer's kernels, from those of the layer; what its two directions share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/instances.h"
#include "kernels/lora_linear_cuda.h"

namespace fused_peft::cuda {

inline bool aligned16(const void* data, int64_t row_stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % kChunk == 0 &&
         columns % kChunk == 0;
}
inline bool aligned16_float(const void* data, int64_t row_stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % 4 == 0 && columns % 4 == 0;
}

inline bool weight_k_major(const LoraLinearParams& p) { return p.weight.col_stride == 1; }
inline int64_t weight_stride(const LoraLinearParams& p) {
  return weight_k_major(p) ? p.weight.row_stride : p.weight.col_stride;
}
inline bool aligned_weight(const LoraLinearParams& p) {
  return aligned16(p.weight.data, weight_stride(p), weight_k_major(p) ? p.k : p.n);
}
inline bool factor_float(const LoraLinearParams& p) { return p.lora_a.dtype == DType::kFloat32; }
inline int segments_of(const LoraLinearParams& p) { return factor_float(p) ? kSegments : 1; }
// Columns of the GEMM's second reduction.
inline int64_t term_columns(const LoraLinearParams& p) {
  return segment_columns(p.r) * segments_of(p);
}

// The factor that is the second source's b, [outer, R] by its strides: used in place where its rows
// suit the GEMM, else a copy.
struct FactorOperand {
  FactorCopy copy;
  GemmSource source;  // b, b_stride, b_aligned, k
};

inline FactorOperand factor_operand(const LoraLinearParams& p, const MatrixView& factor,
                                    int64_t outer, bool reduced_is_row, bool k_major,
                                    Workspace* workspace) {
  FactorOperand operand;
  const int64_t outer_stride = reduced_is_row ? factor.col_stride : factor.row_stride;
  const int64_t reduced_stride = reduced_is_row ? factor.row_stride : factor.col_stride;
  const bool in_place =
      !factor_float(p) &&
      (k_major ? reduced_stride == 1 && aligned16(factor.data, outer_stride, p.r)
               : outer_stride == 1 && aligned16(factor.data, reduced_stride, outer));
  if (in_place) {
    operand.source.b = factor.data;
    operand.source.b_stride = k_major ? outer_stride : reduced_stride;
    operand.source.k = static_cast<int32_t>(p.r);
  } else {
    const int64_t outer_padded = (outer + kChunk - 1) / kChunk * kChunk;
    FactorCopy& copy = operand.copy;
    copy.source = factor.data;
    copy.source_float = factor_float(p);
    copy.outer = outer;
    copy.reduced = p.r;
    copy.outer_stride = outer_stride;
    copy.reduced_stride = reduced_stride;
    copy.target_stride = k_major ? term_columns(p) : outer_padded;
    copy.target = workspace->take((k_major ? outer : term_columns(p)) * copy.target_stride * 2);
    copy.k_major = k_major;
    copy.segments = segments_of(p);
    operand.source.b = copy.target;
    operand.source.b_stride = copy.target_stride;
    operand.source.k = static_cast<int32_t>(term_columns(p));
  }
  operand.source.b_aligned = true;
  return operand;
}

// s or ds as the GEMM's operand.
inline TermsOut take_terms(const LoraLinearParams& p, Workspace* workspace) {
  const int64_t stride = term_columns(p);
  return {workspace->take(p.m * stride * 2), stride, segments_of(p)};
}

// The GEMM's product over the frozen weight: (x, W) or (dy, W^T).
inline GemmSource base_source(const LoraLinearParams& p, const MatrixView& a, int64_t k) {
  GemmSource source;
  source.a = a.data;
  source.a_stride = a.row_stride;
  source.a_aligned = aligned16(a.data, a.row_stride, k);
  source.b = p.weight.data;
  source.b_stride = weight_stride(p);
  source.b_aligned = aligned_weight(p);
  source.k = static_cast<int32_t>(k);
  return source;
}

// Its low-rank product: (s, lora_b) or (ds, lora_a).
inline GemmSource update_source(const FactorOperand& factor, const TermsOut& terms) {
  GemmSource source = factor.source;
  source.a = terms.data;
  source.a_stride = terms.stride;
  source.a_aligned = true;
  return source;
}

inline int64_t copy_ctas(const FactorCopy& copy, int threads) {
  if (!copy.source) return 0;
  const int64_t elements =
      (copy.k_major ? copy.outer * copy.target_stride
                    : copy.target_stride * segment_columns(copy.reduced) * copy.segments);
  return ceil_div(elements, threads * 8);
}

inline SkinnyRows rows_of(const MatrixView& view, int64_t rows, int64_t columns) {
  const bool aligned = view.dtype == DType::kFloat32
                           ? aligned16_float(view.data, view.row_stride, columns)
                           : aligned16(view.data, view.row_stride, columns);
  return {view.data, view.row_stride, rows, aligned};
}

inline Dropout dropout_of(const LoraLinearParams& p, const LaunchContext& context) {
  if (p.dropout_p <= 0.0) return {};
  const double threshold = p.dropout_p * 4294967296.0 + 0.5;
  return {context.seed, threshold >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(threshold)};
}

inline double scaling_of(const LoraLinearParams& p) { return p.scaling / (1.0 - p.dropout_p); }

template <class Element>
Status run_gemm(const GemmVariant& variant, const GemmParams& gemm, const LaunchContext& context,
                bool dependent) {
#ifdef FUSED_PEFT_SM90A
  if (variant.choice.kernel != GemmKernel::kSm80)
    return launch_gemm_sm90<Element>(variant, gemm, context, dependent);
#endif
  return launch_gemm<Element>(variant, gemm, context, dependent);
}

template <template <class, class> class Run, class Args>
Status dispatch(const Args& args, const LoraLinearPlan& plan, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  if (p.x.dtype == DType::kBFloat16)
    return factor_float(p) ? Run<__nv_bfloat16, float>::run(args, plan, context)
                           : Run<__nv_bfloat16, __nv_bfloat16>::run(args, plan, context);
  return factor_float(p) ? Run<__half, float>::run(args, plan, context)
                         : Run<__half, __half>::run(args, plan, context);
}

}  // namespace fused_peft::cuda
