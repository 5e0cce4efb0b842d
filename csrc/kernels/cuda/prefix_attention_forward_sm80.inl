// The launchers of prefix_attention_forward_sm80.cuh for one element type; included by
// prefix_attention_forward_{bf16,f16}_sm80.cu.
#include "kernels/cuda/prefix_attention_instances.h"

namespace fused_peft::cuda {
namespace {

template <class Element, int kHead, int kRowBlocks, bool kPacked>
Status launch_query_tiles(const PrefixAttentionPlan& plan, const AttentionForwardParams& params,
                          const LaunchContext& context) {
  return launch(attention_forward_kernel<Element, kHead, kRowBlocks, kPacked>,
                dim3(static_cast<unsigned>(plan.forward_ctas)), kAttentionThreads,
                AttentionForward<kHead, kRowBlocks>::kSharedBytes, context, false, params);
}

}  // namespace

template <class Element>
Status launch_attention_forward(const PrefixAttentionPlan& plan,
                                const AttentionForwardParams& params,
                                const LaunchContext& context) {
  const Status status = with_head_tile(plan.head, [&](auto tile) {
    constexpr int kHead = decltype(tile)::kHead;
    if (plan.decode) return launch_query_tiles<Element, kHead, 1, true>(plan, params, context);
    if constexpr (has_wide_rows(kHead))
      if (plan.query_rows == kAttentionWideRows)
        return launch_query_tiles<Element, kHead, 2, false>(plan, params, context);
    return launch_query_tiles<Element, kHead, 1, false>(plan, params, context);
  });
  if (status != Status::kOk || !params.part_out) return status;
  const PrefixAttentionParams& p = params.problem;
  return launch(attention_combine_kernel<Element>,
                dim3(static_cast<unsigned>(
                    ceil_div(p.batch * p.q_heads * p.queries, kAttentionThreads / 32))),
                kAttentionThreads, 0, context, false, params);
}

}  // namespace fused_peft::cuda
