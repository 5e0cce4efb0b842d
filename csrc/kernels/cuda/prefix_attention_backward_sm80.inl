// The launchers of prefix_attention_backward_sm80.cuh for one element type; included by
// prefix_attention_backward_{bf16,f16}_sm80.cu.
#include "kernels/cuda/prefix_attention_instances.h"

namespace fused_peft::cuda {
namespace {

template <class Element, int kHead, bool kWantK, bool kWantV>
Status launch_dkv(const PrefixAttentionPlan& plan, const AttentionBackwardParams& params,
                  const LaunchContext& context) {
  return launch(attention_dkv_kernel<Element, kHead, kWantK, kWantV>,
                dim3(static_cast<unsigned>(plan.dkv_ctas)), kAttentionThreads,
                AttentionDkv<kHead>::kSharedBytes, context, false, params);
}

template <class Element, int kHead>
Status launch_key_gradients(const PrefixAttentionPlan& plan, const AttentionBackwardParams& params,
                            const LaunchContext& context) {
  const bool want_k = params.dk.data || params.dprefix_k.data;
  const bool want_v = params.dv.data || params.dprefix_v.data;
  if (plan.dkv_ctas == 0 || (!want_k && !want_v)) return Status::kOk;
  if constexpr (!dkv_in_two_launches(kHead)) {
    return launch_dkv<Element, kHead, true, true>(plan, params, context);
  } else {
    Status status = Status::kOk;
    if (want_k) status = launch_dkv<Element, kHead, true, false>(plan, params, context);
    if (status == Status::kOk && want_v)
      status = launch_dkv<Element, kHead, false, true>(plan, params, context);
    return status;
  }
}

}  // namespace

template <class Element>
Status launch_attention_backward(const PrefixAttentionPlan& plan,
                                 const AttentionBackwardParams& params,
                                 const LaunchContext& context) {
  const PrefixAttentionParams& p = params.problem;
  const Status status = with_head_tile(plan.head, [&](auto tile) {
    using Tile = decltype(tile);
    constexpr int kHead = Tile::kHead;
    if (plan.dq_ctas > 0) {
      const int64_t rows = p.batch * p.q_heads * params.padded_queries;
      const int64_t ctas = ceil_div(rows * (Tile::kCols / kChunk), kAttentionThreads);
      const Status done =
          launch(attention_delta_kernel<Element, kHead>, dim3(static_cast<unsigned>(ctas)),
                 kAttentionThreads, 0, context, false, params);
      if (done != Status::kOk) return done;
    }
    const Status done = launch_key_gradients<Element, kHead>(plan, params, context);
    if (done != Status::kOk || !params.dq.data || plan.dq_ctas == 0) return done;
    return launch(attention_dq_kernel<Element, kHead>, dim3(static_cast<unsigned>(plan.dq_ctas)),
                  kAttentionThreads, AttentionDq<kHead>::kSharedBytes, context, false, params);
  });
  if (status != Status::kOk || !(params.parts_k || params.parts_v)) return status;
  return launch(attention_reduce_kernel<Element>,
                dim3(static_cast<unsigned>(
                         ceil_div(p.kv_heads * p.prefix * p.head_dim, 2 * kAttentionThreads)),
                     2),
                kAttentionThreads, 0, context, false, params);
}

}  // namespace fused_peft::cuda
