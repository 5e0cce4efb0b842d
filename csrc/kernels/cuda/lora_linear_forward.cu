// The LoRA layer's forward pass on the GPU: which kernels, in what order, on which operands. See
// lora_linear_config.h for the choice.
#include "kernels/cuda/lora_linear_operands.h"

namespace fused_peft::cuda {
namespace {

// Everything a forward pass launches; `workspace` without a base only measures.
struct ForwardJob {
  TermsOut terms;
  FactorOperand factor;
};

ForwardJob plan_forward(const LoraLinearParams& p, const LoraLinearPlan& plan,
                        Workspace* workspace) {
  ForwardJob job;
  if (plan.forward != ForwardPath::kTwoLaunches) return job;
  job.terms = take_terms(p, workspace);
  job.factor = factor_operand(p, p.lora_b, p.n, false, weight_k_major(p), workspace);
  return job;
}

template <class Element, class Factor>
Status decode(const LoraLinearForward& args, const LoraLinearPlan& plan,
              const LaunchContext& context) {
  if (plan.decode.cluster > 0) return launch_decode_sm90<Element, Factor>(args, plan, context);
  const LoraLinearParams& p = args.problem;
  LoraDecodeParams params;
  params.k = p.k;
  params.n = p.n;
  params.x = rows_of(p.x, p.m, p.k);
  params.weight = rows_of(p.weight, p.n, p.k);
  params.lora_a = rows_of(p.lora_a, p.r, p.k);
  params.lora_b = p.lora_b.data;
  params.lora_b_stride = p.lora_b.row_stride;
  params.scaling = p.scaling;
  params.bias = p.bias.data;
  params.s = args.s;
  params.y = args.y;
  params.y_stride = args.y_row_stride;
  return launch_decode<Element, Factor>(plan.down.rank, plan.decode.ctas, params, context);
}

template <class Element, class Factor>
Status forward(const LoraLinearForward& args, const LoraLinearPlan& plan,
               const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  if (plan.forward == ForwardPath::kDecode) return decode<Element, Factor>(args, plan, context);
#ifdef FUSED_PEFT_SM90A
  if (plan.forward == ForwardPath::kSingleLaunch)
    return launch_single_forward<Element>(args, plan.gemm, context);
#endif

  Workspace workspace(context.workspace);
  const ForwardJob job = plan_forward(p, plan, &workspace);
  GemmVariant variant;
  variant.choice = plan.gemm;
  variant.b_k_major = weight_k_major(p);
  GemmParams gemm;
  gemm.m = p.m;
  gemm.n = p.n;
  gemm.source[0] = base_source(p, p.x, p.k);
  gemm.bias = p.bias.data;
  gemm.c = args.y;
  gemm.c_stride = args.y_row_stride;
  gemm.c_aligned = aligned16(args.y, args.y_row_stride, kChunk);
  variant.aligned = gemm.source[0].a_aligned && gemm.source[0].b_aligned;

  if (plan.forward == ForwardPath::kFusedDown) {
    GemmSource& update = gemm.source[1];
    update.b = p.lora_b.data;
    update.b_stride = p.lora_b.row_stride;
    update.b_aligned = aligned16(p.lora_b.data, p.lora_b.row_stride, p.r);
    update.k = static_cast<int32_t>(p.r);
    gemm.lora_a = p.lora_a.data;
    gemm.lora_a_stride = p.lora_a.row_stride;
    gemm.lora_a_aligned = aligned16(p.lora_a.data, p.lora_a.row_stride, p.k);
    gemm.scaling = static_cast<float>(p.scaling);
    gemm.s = args.s;
    variant.down_rank = plan.down.rank;
    variant.aligned = variant.aligned && update.b_aligned && gemm.lora_a_aligned;
    return launch_gemm<Element>(variant, gemm, context, false);
  }

  LoraDownParams down;
  down.k = p.k;
  down.x = rows_of(p.x, p.m, p.k);
  down.lora_a = rows_of(p.lora_a, p.r, p.k);
  down.scaling = scaling_of(p);
  down.dropout = dropout_of(p, context);
  down.s = args.s;
  down.terms = job.terms;
  down.copy = job.factor.copy;
  down.row_blocks = static_cast<int>(plan.down.ctas);
  const int64_t extra = copy_ctas(down.copy, kSkinnyThreads);
  const Status status =
      plan.down.cluster > 0
          ? launch_down_sm90<Element, Factor>(plan.down, down, p.x.dtype, extra, context)
          : launch_down<Element, Factor>(plan.down.rank, down, extra, context);
  if (status != Status::kOk) return status;
  gemm.source[1] = update_source(job.factor, job.terms);
  variant.dependent_source = 1;
  return run_gemm<Element>(variant, gemm, context, true);
}

template <class Element, class Factor>
struct RunForward {
  static Status run(const LoraLinearForward& args, const LoraLinearPlan& plan,
                    const LaunchContext& context) {
    return forward<Element, Factor>(args, plan, context);
  }
};
LoraLinearPlan forward_plan(const LoraLinearForward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  LoraLinearShape shape = shape_of(p);
  shape.aligned = shape.aligned && aligned16(args.y, args.y_row_stride, p.n);
  shape.single_launch = context.single_launch_state != nullptr;
  return plan_lora_linear(shape, context.device);
}

}  // namespace

int64_t forward_workspace_bytes(const LoraLinearForward& args, const LaunchContext& context) {
  Workspace workspace(nullptr);
  plan_forward(args.problem, forward_plan(args, context), &workspace);
  return workspace.used();
}

Status lora_linear_forward(const LoraLinearForward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  if (!supports(p)) return Status::kUnsupported;
  if (p.m == 0) return Status::kOk;
  return dispatch<RunForward>(args, forward_plan(args, context), context);
}

}  // namespace fused_peft::cuda
