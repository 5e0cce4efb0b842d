// The launchers of lora_backward_sm80.cuh for one element type; included by
// lora_backward_{bf16,f16}_sm80.cu.
#include "kernels/cuda/instances.h"

namespace fused_peft::cuda {
namespace {

template <class Element, class Factor, int kRank, int kRowBlocks, int kWarps, int kStages>
Status launch_dy(const DyPassParams& params, int64_t extra_ctas, const LaunchContext& context) {
  using Pass = DyPass<Element, Factor, kRank, kRowBlocks, kWarps, kStages>;
  return launch(dy_pass_kernel<Element, Factor, kRank, kRowBlocks, kWarps, kStages>,
                dim3(unsigned(params.row_blocks + extra_ctas)), Pass::kThreads, Pass::kSharedBytes,
                context, false, params);
}

template <class Element, class Factor, int kRank, int kWarps, int kStages>
Status launch_x(const SkinnyChoice& choice, const XPassParams& params, int64_t extra_ctas,
                const LaunchContext& context) {
  using Pass = XPass<Element, Factor, kRank, kWarps, kStages>;
  return launch(x_pass_kernel<Element, Factor, kRank, kWarps, kStages>,
                dim3(unsigned(params.column_blocks + extra_ctas), unsigned(choice.rank_blocks)),
                Pass::kThreads, Pass::kSharedBytes, context, true, params);
}

}  // namespace

// Warps and stages are what keeps a CTA under 99 KiB of shared memory, the least that a current
// device has.
template <class Element, class Factor>
Status launch_dy_pass(const SkinnyChoice& choice, const DyPassParams& params, int64_t extra_ctas,
                      const LaunchContext& context) {
  constexpr bool kFloat = sizeof(Factor) == 4;
  if (choice.rank == 16)
    return choice.row_blocks == 1
               ? launch_dy<Element, Factor, 16, 1, 8, kFloat ? 2 : 3>(params, extra_ctas, context)
               : launch_dy<Element, Factor, 16, 4, 4, 3>(params, extra_ctas, context);
  if (choice.rank == 64)
    return launch_dy<Element, Factor, 64, kFloat ? 2 : 4, 4, 2>(params, extra_ctas, context);
  return launch_dy<Element, Factor, 256, 1, kFloat ? 1 : 2, 2>(params, extra_ctas, context);
}

template <class Element, class Factor>
Status launch_x_pass(const SkinnyChoice& choice, const XPassParams& params, int64_t extra_ctas,
                     const LaunchContext& context) {
  constexpr bool kFloat = sizeof(Factor) == 4;
  if (choice.rank == 16)
    return launch_x<Element, Factor, 16, 8, kFloat ? 2 : 3>(choice, params, extra_ctas, context);
  if (choice.rank == 64)
    return launch_x<Element, Factor, 64, 4, kFloat ? 2 : 3>(choice, params, extra_ctas, context);
  return launch_x<Element, Factor, 128, kFloat ? 2 : 4, 2>(choice, params, extra_ctas, context);
}

template <class Element>
Status launch_reduce(const ReduceParams& params, const LaunchContext& context) {
  return launch(reduce_parts_kernel<Element>, dim3(unsigned(ceil_div(params.elements, 256))), 256,
                0, context, true, params);
}

template <class Element>
Status launch_column_sum(const void* dy, int64_t stride, int64_t m, int64_t n, void* dbias,
                         const LaunchContext& context) {
  return launch(column_sum_kernel<Element>, dim3(unsigned(ceil_div(n, 32))), 256, 0, context, false,
                static_cast<const Element*>(dy), stride, m, n, static_cast<Element*>(dbias));
}

}  // namespace fused_peft::cuda

#define FUSED_PEFT_INSTANTIATE_BACKWARD(Element, Factor)                                           \
  template Status launch_dy_pass<Element, Factor>(const SkinnyChoice&, const DyPassParams&,        \
                                                  int64_t, const LaunchContext&);                  \
  template Status launch_x_pass<Element, Factor>(const SkinnyChoice&, const XPassParams&, int64_t, \
                                                 const LaunchContext&);
