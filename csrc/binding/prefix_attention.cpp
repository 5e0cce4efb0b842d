// Ops fused_peft::prefix_attention and fused_peft::prefix_attention_backward for the CPU. Written
// against torch's stable ABI.
#include "kernels/prefix_attention.h"

#include <torch/csrc/stable/library.h>

#include "binding/cpu_isa.h"
#include "binding/prefix_operands.h"

namespace fused_peft {
namespace {

std::tuple<Tensor, Tensor> prefix_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> prefix_k,
    std::optional<Tensor> prefix_v, std::optional<Tensor> key_lengths,
    std::optional<Tensor> key_mask, std::optional<Tensor> query_start, bool causal,
    int64_t sliding_window, double scale, double dropout_p, std::optional<Tensor> seed) {
  const attention::Operands o = attention::gather(
      q, k, v, prefix_k, prefix_v,
      {key_lengths, key_mask, query_start, causal, sliding_window, scale, dropout_p}, 1);
  PrefixAttentionForward args;
  args.problem = o.params;
  args.problem.seed = seed_of(seed, dropout_p);
  const attention::Outputs outputs = attention::allocate_outputs(args, q);
  check_status(cpu::prefix_attention_forward(args, cpu::chosen_isa(), torch_threads()),
               "prefix_attention");
  return {outputs.out, outputs.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
    std::optional<Tensor> prefix_k, std::optional<Tensor> prefix_v, const Tensor& out,
    const Tensor& lse, std::optional<Tensor> key_lengths, std::optional<Tensor> key_mask,
    std::optional<Tensor> query_start, bool causal, int64_t sliding_window, double scale,
    double dropout_p, std::optional<Tensor> seed, bool need_dq, bool need_dk, bool need_dv,
    bool need_dprefix_k, bool need_dprefix_v) {
  const attention::Operands o = attention::gather(
      q, k, v, prefix_k, prefix_v,
      {key_lengths, key_mask, query_start, causal, sliding_window, scale, dropout_p}, 1);
  attention::BackwardJob job = attention::prepare_backward(
      o, dout, out, lse, {need_dq, need_dk, need_dv, need_dprefix_k, need_dprefix_v}, 1);
  job.args.problem.seed = seed_of(seed, dropout_p);
  check_status(cpu::prefix_attention_backward(job.args, cpu::chosen_isa(), torch_threads()),
               "prefix_attention_backward");
  return {job.dq, job.dk, job.dv, job.dprefix_k, job.dprefix_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_peft, m) { attention::define(m); }

STABLE_TORCH_LIBRARY_IMPL(fused_peft, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}

}  // namespace fused_peft
