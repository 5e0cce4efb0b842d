// The kernels that are compiled, one launcher a family, each in a file of its own so that they
// build in parallel.
#pragma once

#include "kernels/cuda/gemm_dual_sm80.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/lora_backward_sm80.cuh"
#include "kernels/cuda/lora_decode_sm80.cuh"
#include "kernels/cuda/lora_down_sm80.cuh"
#include "kernels/cuda/lora_linear_config.h"
#include "kernels/lora_linear.h"

namespace fused_peft::cuda {

// What selects a GEMM kernel beside the element type.
struct GemmVariant {
  GemmChoice choice;
  bool b_k_major = true, aligned = true, mask = false;
  int down_rank = 0;         // of the fused down projection; 0: none
  int dependent_source = 2;  // from which source on operands are the previous kernel's output
};

template <class Element>
Status launch_gemm(const GemmVariant& variant, const GemmParams& params,
                   const LaunchContext& context, bool dependent);

// The same by the kernels for sm_90a. Every operand has 16-byte rows and base, M < 2^31.
template <class Element>
Status launch_gemm_sm90(const GemmVariant& variant, const GemmParams& params,
                        const LaunchContext& context, bool dependent);

// The forward pass in one launch (sm_90a).
template <class Element>
Status launch_single_forward(const LoraLinearForward& args, const GemmChoice& choice,
                             const LaunchContext& context);

// dx, ds in one segment and, where parts is not null, dlora_b [row tiles, N, R] in one launch
// (sm_90a).
template <class Element>
Status launch_single_backward(const LoraLinearBackward& args, const TermsOut& ds, float* parts,
                              const GemmChoice& choice, const LaunchContext& context);

// rank: 16, 64 or 256 columns of accumulators. extra_ctas copy a factor.
template <class Element, class Factor>
Status launch_down(int rank, const LoraDownParams& params, int64_t extra_ctas,
                   const LaunchContext& context);

// The same on a cluster of choice.cluster CTAs; dtype is Element's.
template <class Element, class Factor>
Status launch_down_sm90(const SkinnyChoice& choice, const LoraDownParams& params, DType dtype,
                        int64_t extra_ctas, const LaunchContext& context);

template <class Element, class Factor>
Status launch_decode(int rank, int64_t ctas, const LoraDecodeParams& params,
                     const LaunchContext& context);

// Encodes the tensor maps, which take the operands' strides: hence the whole problem.
template <class Element, class Factor>
Status launch_decode_sm90(const LoraLinearForward& args, const LoraLinearPlan& plan,
                          const LaunchContext& context);

template <class Element, class Factor>
Status launch_dy_pass(const SkinnyChoice& choice, const DyPassParams& params, int64_t extra_ctas,
                      const LaunchContext& context);

// The same on a cluster of choice.cluster CTAs; dtype is Element's.
template <class Element, class Factor>
Status launch_dy_pass_sm90(const SkinnyChoice& choice, const DyPassParams& params, DType dtype,
                           int64_t extra_ctas, const LaunchContext& context);

template <class Element, class Factor>
Status launch_x_pass(const SkinnyChoice& choice, const XPassParams& params, int64_t extra_ctas,
                     const LaunchContext& context);

// The same on a cluster of choice.cluster CTAs; dtype is Element's.
template <class Element, class Factor>
Status launch_x_pass_sm90(const SkinnyChoice& choice, const XPassParams& params, DType dtype,
                          int64_t extra_ctas, const LaunchContext& context);

template <class Element>
Status launch_reduce(const ReduceParams& params, const LaunchContext& context);

template <class Element>
Status launch_column_sum(const void* dy, int64_t stride, int64_t m, int64_t n, void* dbias,
                         const LaunchContext& context);

}  // namespace fused_peft::cuda
