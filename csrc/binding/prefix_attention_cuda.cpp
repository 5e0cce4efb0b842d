// Ops fused_peft::prefix_attention and its backward pass for CUDA.
#include "kernels/prefix_attention_cuda.h"

#include <torch/csrc/stable/library.h>

#include "binding/cuda_device.h"
#include "binding/prefix_operands.h"

namespace fused_peft {
namespace {

void read_operands(DeviceScope& scope, const attention::Operands& o) {
  for (const Tensor* operand : {&o.q, &o.k, &o.v}) scope.reads(*operand);
  for (const auto* optional :
       {&o.prefix_k, &o.prefix_v, &o.key_lengths, &o.key_mask, &o.query_start})
    if (optional->has_value()) scope.reads(**optional);
}

void refuse_dropout(double dropout_p) {
  STD_TORCH_CHECK(dropout_p == 0.0, "fused_peft: dropout_p is ", dropout_p,
                  "; the CUDA kernels of prefix_attention have no dropout");
}

std::tuple<Tensor, Tensor> prefix_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> prefix_k,
    std::optional<Tensor> prefix_v, std::optional<Tensor> key_lengths,
    std::optional<Tensor> key_mask, std::optional<Tensor> query_start, bool causal,
    int64_t sliding_window, double scale, double dropout_p, std::optional<Tensor>) {
  refuse_dropout(dropout_p);
  DeviceScope scope(q);
  const attention::Operands o = attention::gather(
      q, k, v, prefix_k, prefix_v,
      {key_lengths, key_mask, query_start, causal, sliding_window, scale, dropout_p},
      cuda::kAttentionAlignment);
  PrefixAttentionForward args;
  args.problem = o.params;
  const attention::Outputs outputs = attention::allocate_outputs(args, q);
  read_operands(scope, o);
  scope.writes(outputs.out);
  scope.writes(outputs.lse);
  cuda::LaunchContext& context = scope.context();
  context.workspace =
      scope.workspace(q, cuda::forward_workspace_bytes(args.problem, scope.facts()));
  check_launch_status(cuda::prefix_attention_forward(args, context), "prefix_attention");
  return {outputs.out, outputs.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
    std::optional<Tensor> prefix_k, std::optional<Tensor> prefix_v, const Tensor& out,
    const Tensor& lse, std::optional<Tensor> key_lengths, std::optional<Tensor> key_mask,
    std::optional<Tensor> query_start, bool causal, int64_t sliding_window, double scale,
    double dropout_p, std::optional<Tensor>, bool need_dq, bool need_dk, bool need_dv,
    bool need_dprefix_k, bool need_dprefix_v) {
  refuse_dropout(dropout_p);
  DeviceScope scope(q);
  const attention::Operands o = attention::gather(
      q, k, v, prefix_k, prefix_v,
      {key_lengths, key_mask, query_start, causal, sliding_window, scale, dropout_p},
      cuda::kAttentionAlignment);
  const attention::BackwardJob job = attention::prepare_backward(
      o, dout, out, lse, {need_dq, need_dk, need_dv, need_dprefix_k, need_dprefix_v},
      cuda::kAttentionAlignment);
  read_operands(scope, o);
  for (const Tensor* operand : {&job.dout, &job.out, &job.lse}) scope.reads(*operand);
  for (const Tensor* gradient : {&job.dq, &job.dk, &job.dv, &job.dprefix_k, &job.dprefix_v})
    scope.writes(*gradient);
  cuda::LaunchContext& context = scope.context();
  context.workspace = scope.workspace(q, cuda::backward_workspace_bytes(job.args, scope.facts()));
  check_launch_status(cuda::prefix_attention_backward(job.args, context),
                      "prefix_attention_backward");
  return {job.dq, job.dk, job.dv, job.dprefix_k, job.dprefix_v};
}

}  // namespace

#ifdef FUSED_PEFT_SIMULATED_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fused_peft_simulated, m) { attention::define(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(FUSED_PEFT_CUDA_NAMESPACE, FUSED_PEFT_CUDA_KEY, m) {
  m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}

}  // namespace fused_peft
