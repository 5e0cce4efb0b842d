// Prefix attention on the GPU: which kernels, in what order, on which memory. See
// prefix_attention_config.h for the choice.
#include "kernels/prefix_attention_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/prefix_attention_instances.h"

namespace fused_peft::cuda {
namespace {

PrefixAttentionShape shape_of(const PrefixAttentionParams& p) {
  return {p.batch, p.q_heads, p.kv_heads, p.queries, p.keys, p.prefix, p.head_dim, p.shared_prefix};
}

float* take_floats(Workspace* workspace, int64_t count) {
  return static_cast<float*>(workspace->take(count * 4));
}

void place(AttentionForwardParams* args, const PrefixAttentionPlan& plan, Workspace* workspace) {
  args->query_tiles = static_cast<int32_t>(plan.query_tiles);
  args->cascade_tiles = static_cast<int32_t>(plan.cascade_tiles);
  args->key_splits = plan.key_splits;
  args->cascade_splits = plan.cascade_splits;
  const int32_t parts = plan.key_splits + plan.cascade_splits;
  if (parts == 1) return;
  const PrefixAttentionParams& p = args->problem;
  const int64_t rows = parts * p.batch * p.q_heads * p.queries;
  args->part_out = take_floats(workspace, rows * p.head_dim);
  args->part_lse = take_floats(workspace, rows);
}

void place(AttentionBackwardParams* args, const PrefixAttentionPlan& plan, Workspace* workspace) {
  const PrefixAttentionParams& p = args->problem;
  args->padded_queries = static_cast<int32_t>(ceil_div(p.queries, kAttentionRows) * kAttentionRows);
  args->key_tiles = static_cast<int32_t>(plan.key_tiles);
  args->prefix_tiles = static_cast<int32_t>(plan.prefix_tiles);
  args->prefix_splits = plan.prefix_splits;
  const int64_t rows = p.batch * p.q_heads * args->padded_queries;
  args->lse2 = take_floats(workspace, rows);
  args->delta = take_floats(workspace, rows);
  if (plan.prefix_splits == 1) return;
  const int64_t part = plan.prefix_splits * p.kv_heads * p.prefix * p.head_dim;
  if (args->dprefix_k.data) args->parts_k = take_floats(workspace, part);
  if (args->dprefix_v.data) args->parts_v = take_floats(workspace, part);
}

AttentionBackwardParams params_of(const PrefixAttentionBackward& args) {
  AttentionBackwardParams params;
  params.problem = args.problem;
  params.dout = args.dout;
  params.out = args.out;
  params.lse = static_cast<const float*>(args.lse);
  params.dq = args.dq;
  params.dk = args.dk;
  params.dv = args.dv;
  params.dprefix_k = args.dprefix_k;
  params.dprefix_v = args.dprefix_v;
  return params;
}

}  // namespace

bool supports(const PrefixAttentionParams& p) {
  constexpr int64_t kLongest = int64_t{1} << 30, kMostCtas = 0x7fffffff;
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return false;
  if (p.head_dim % kChunk != 0 || p.head_dim > kAttentionMaxHeadDim) return false;
  if (p.dropout_p != 0.0 || p.queries > kLongest || p.keys > kLongest || p.prefix > kLongest)
    return false;
  const PrefixAttentionPlan plan = plan_prefix_attention(shape_of(p), DeviceFacts{});
  return plan.dq_ctas * 64 <= kMostCtas && plan.dkv_ctas <= kMostCtas;
}

int64_t forward_workspace_bytes(const PrefixAttentionParams& p, const DeviceFacts& device) {
  AttentionForwardParams params;
  params.problem = p;
  Workspace workspace(nullptr);
  place(&params, plan_prefix_attention(shape_of(p), device), &workspace);
  return workspace.used();
}

int64_t backward_workspace_bytes(const PrefixAttentionBackward& args, const DeviceFacts& device) {
  AttentionBackwardParams params = params_of(args);
  Workspace workspace(nullptr);
  place(&params, plan_prefix_attention(shape_of(args.problem), device), &workspace);
  return workspace.used();
}

Status prefix_attention_forward(const PrefixAttentionForward& args, const LaunchContext& context) {
  const PrefixAttentionParams& p = args.problem;
  if (!supports(p)) return Status::kUnsupported;
  const PrefixAttentionPlan plan = plan_prefix_attention(shape_of(p), context.device);
  if (plan.forward_ctas == 0) return Status::kOk;
  AttentionForwardParams params;
  params.problem = p;
  params.out = args.out;
  params.lse = static_cast<float*>(args.lse);
  params.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  Workspace workspace(context.workspace);
  place(&params, plan, &workspace);
  return p.dtype == DType::kBFloat16
             ? launch_attention_forward<__nv_bfloat16>(plan, params, context)
             : launch_attention_forward<__half>(plan, params, context);
}

Status prefix_attention_backward(const PrefixAttentionBackward& args,
                                 const LaunchContext& context) {
  const PrefixAttentionParams& p = args.problem;
  if (!supports(p)) return Status::kUnsupported;
  const PrefixAttentionPlan plan = plan_prefix_attention(shape_of(p), context.device);
  AttentionBackwardParams params = params_of(args);
  Workspace workspace(context.workspace);
  place(&params, plan, &workspace);
  return p.dtype == DType::kBFloat16
             ? launch_attention_backward<__nv_bfloat16>(plan, params, context)
             : launch_attention_backward<__half>(plan, params, context);
}

}  // namespace fused_peft::cuda
