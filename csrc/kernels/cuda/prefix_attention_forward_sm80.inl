// The launchers of prefix_attention_forward_sm80.cuh for one element type; included by
// prefix_attention_forward_{bf16,f16}_sm80.cu.
#include "kernels/cuda/prefix_attention_instances.h"

namespace fused_peft::cuda {

template <class Element>
Status launch_attention_forward(const PrefixAttentionPlan& plan,
                                const AttentionForwardParams& params,
                                const LaunchContext& context) {
  const Status status = with_head_tile(plan.head, [&](auto tile) {
    constexpr int kHead = decltype(tile)::kHead;
    return launch(plan.decode ? attention_forward_kernel<Element, kHead, true>
                              : attention_forward_kernel<Element, kHead, false>,
                  dim3(static_cast<unsigned>(plan.forward_ctas)), kAttentionThreads,
                  AttentionForward<kHead>::kSharedBytes, context, false, params);
  });
  if (status != Status::kOk || plan.key_splits == 1) return status;
  const PrefixAttentionParams& p = params.problem;
  return launch(attention_combine_kernel<Element>,
                dim3(static_cast<unsigned>(
                    ceil_div(p.batch * p.q_heads * p.queries, kAttentionThreads / 32))),
                kAttentionThreads, 0, context, false, params);
}

}  // namespace fused_peft::cuda
