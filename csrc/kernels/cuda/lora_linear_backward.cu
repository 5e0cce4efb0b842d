// The LoRA layer's backward pass on the GPU: which kernels, in what order, on which operands. See
// lora_linear_config.h for the choice.
#include "kernels/cuda/lora_linear_operands.h"

namespace fused_peft::cuda {
namespace {

// Rows of ds in float32 are whole 16-byte pieces, as vector and tensor copies want them.
int64_t float_ds_stride(const LoraLinearParams& p) { return ceil_div(p.r, 4) * 4; }

struct BackwardJob {
  bool want_ds = false;
  TermsOut terms;
  float* ds = nullptr;
  float* parts = nullptr;  // [count, N, R]
  int64_t count = 0;
  bool direct = false;  // the dy pass writes dlora_b itself
  FactorOperand factor;
};

BackwardJob plan_backward(const LoraLinearBackward& args, const LoraLinearPlan& plan,
                          Workspace* workspace) {
  const LoraLinearParams& p = args.problem;
  BackwardJob job;
  job.want_ds = args.dx || args.dlora_a;
  if (job.want_ds) {
    job.terms = take_terms(p, workspace);
    if (args.dlora_a && factor_float(p))
      job.ds = static_cast<float*>(workspace->take(p.m * float_ds_stride(p) * 4));
  }
  const bool single = plan.backward == BackwardPath::kSingleLaunch;
  if (args.dlora_b) {
    job.count = single ? ceil_div(p.m, kSingleLaunchRows) : dy_row_tiles(p.m, plan.dy_pass);
    job.direct = job.count == 1 && factor_float(p);
    job.parts = job.direct ? static_cast<float*>(args.dlora_b)
                           : static_cast<float*>(workspace->take(job.count * p.n * p.r * 4));
  }
  if (args.dx && !single)
    job.factor = factor_operand(p, p.lora_a, p.k, true, !weight_k_major(p), workspace);
  return job;
}

template <class Element, class Factor>
Status dy_pass(const LoraLinearBackward& args, const LoraLinearPlan& plan, const BackwardJob& job,
               const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  DyPassParams params;
  params.m = p.m;
  params.n = p.n;
  params.r = static_cast<int>(p.r);
  params.dy = args.dy.data;
  params.dy_stride = args.dy.row_stride;
  params.dy_aligned = aligned16(args.dy.data, args.dy.row_stride, p.n);
  params.lora_b = p.lora_b.data;
  params.lora_b_stride = p.lora_b.row_stride;
  params.lora_b_aligned = rows_of(p.lora_b, p.n, p.r).aligned;
  params.s = args.dlora_b ? args.s : nullptr;
  params.s_aligned = aligned16_float(args.s, p.r, p.r);
  params.scaling = scaling_of(p);
  params.ds = job.ds;
  params.ds_stride = float_ds_stride(p);
  params.terms = job.terms;
  params.want_ds = job.want_ds;
  params.dlora_b_parts = job.parts;
  params.copy = job.factor.copy;
  params.row_blocks = static_cast<int>(plan.dy_pass.ctas);
  const int64_t extra = copy_ctas(params.copy, 128);
  return plan.dy_pass.cluster > 0
             ? launch_dy_pass_sm90<Element, Factor>(plan.dy_pass, params, p.x.dtype, extra, context)
             : launch_dy_pass<Element, Factor>(plan.dy_pass, params, extra, context);
}

template <class Element, class Factor>
Status dlora_a_pass(const LoraLinearBackward& args, const LoraLinearPlan& plan,
                    const BackwardJob& job, const ReduceParams& reduce,
                    const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  XPassParams params;
  params.m = p.m;
  params.k = p.k;
  params.r = static_cast<int>(p.r);
  params.x = p.x.data;
  params.x_stride = p.x.row_stride;
  params.x_aligned = aligned16(p.x.data, p.x.row_stride, p.k);
  params.ds = job.ds ? static_cast<const void*>(job.ds) : job.terms.data;
  params.ds_stride = job.ds ? float_ds_stride(p) : job.terms.stride;
  params.dropout = dropout_of(p, context);
  params.dlora_a = args.dlora_a;
  params.reduce = reduce;
  params.column_blocks = static_cast<int>(plan.x_pass.ctas);
  const int64_t extra = reduce.parts ? ceil_div(reduce.elements, 1024) : 0;
  return plan.x_pass.cluster > 0
             ? launch_x_pass_sm90<Element, Factor>(plan.x_pass, params, p.x.dtype, extra, context)
             : launch_x_pass<Element, Factor>(plan.x_pass, params, extra, context);
}

template <class Element>
Status dx_gemm(const LoraLinearBackward& args, const LoraLinearPlan& plan, const BackwardJob& job,
               const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  GemmParams gemm;
  gemm.m = p.m;
  gemm.n = p.k;
  gemm.c = args.dx;
  gemm.c_stride = p.k;
  gemm.dropout = dropout_of(p, context);
  GemmVariant variant;
  variant.choice = plan.gemm_backward;
  variant.b_k_major = !weight_k_major(p);
  variant.mask = p.dropout_p > 0.0;
  // The low-rank product first where dropout's mask is applied, to it alone; else last, since it is
  // the one that waits for the kernel before.
  gemm.c_aligned = aligned16(args.dx, p.k, kChunk);
  const bool sm90 = variant.choice.kernel != GemmKernel::kSm80;
  const int update = sm90 && !variant.mask ? 1 : 0;
  gemm.source[update] = update_source(job.factor, job.terms);
  gemm.source[1 - update] = base_source(p, args.dy, p.n);
  variant.aligned = gemm.source[1 - update].a_aligned && gemm.source[1 - update].b_aligned;
  variant.dependent_source = update;
  return run_gemm<Element>(variant, gemm, context, sm90);
}

template <class Element, class Factor>
Status backward(const LoraLinearBackward& args, const LoraLinearPlan& plan,
                const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  Workspace workspace(context.workspace);
  const BackwardJob job = plan_backward(args, plan, &workspace);
  const bool single = plan.backward == BackwardPath::kSingleLaunch;
  Status status = Status::kOk;
#ifdef FUSED_PEFT_SM90A
  if (single)
    status =
        launch_single_backward<Element>(args, job.terms, job.parts, plan.gemm_backward, context);
#endif
  if (!single && (job.want_ds || args.dlora_b))
    status = dy_pass<Element, Factor>(args, plan, job, context);
  ReduceParams reduce;
  if (args.dlora_b && !job.direct)
    reduce = {job.parts, job.count, p.n * p.r, args.dlora_b, factor_float(p)};
  if (status == Status::kOk && args.dlora_a)
    status = dlora_a_pass<Element, Factor>(args, plan, job, reduce, context);
  else if (status == Status::kOk && reduce.parts)
    status = launch_reduce<Element>(reduce, context);
  if (status == Status::kOk && args.dx && !single)
    status = dx_gemm<Element>(args, plan, job, context);
  if (status == Status::kOk && args.dbias)
    status =
        launch_column_sum<Element>(args.dy.data, args.dy.row_stride, p.m, p.n, args.dbias, context);
  return status;
}

// Without tokens there is nothing to launch; gradients of the factors are zero.
Status clear_gradients(const LoraLinearBackward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  const int64_t factor_bytes = factor_float(p) ? 4 : 2;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const auto clear = [&](void* data, int64_t bytes) {
    return !data || cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream) == cudaSuccess;
  };
  const bool done = clear(args.dlora_a, p.r * p.k * factor_bytes) &&
                    clear(args.dlora_b, p.n * p.r * factor_bytes) && clear(args.dbias, p.n * 2);
  return done ? Status::kOk : Status::kLaunchFailed;
}

template <class Element, class Factor>
struct RunBackward {
  static Status run(const LoraLinearBackward& args, const LoraLinearPlan& plan,
                    const LaunchContext& context) {
    return backward<Element, Factor>(args, plan, context);
  }
};

LoraLinearPlan backward_plan(const LoraLinearBackward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  LoraLinearShape shape = shape_of(p);
  shape.aligned = shape.aligned && aligned16(args.dy.data, args.dy.row_stride, p.n) &&
                  (!args.dx || aligned16(args.dx, p.k, p.k));
  shape.single_launch = context.single_launch_state && aligned16(args.s, 0, 0);
  shape.dx = args.dx != nullptr;
  return plan_lora_linear(shape, context.device);
}

}  // namespace

int64_t backward_workspace_bytes(const LoraLinearBackward& args, const LaunchContext& context) {
  Workspace workspace(nullptr);
  plan_backward(args, backward_plan(args, context), &workspace);
  return workspace.used();
}

Status lora_linear_backward(const LoraLinearBackward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  if (!supports(p)) return Status::kUnsupported;
  if (p.m == 0) return clear_gradients(args, context);
  return dispatch<RunBackward>(args, backward_plan(args, context), context);
}

}  // namespace fused_peft::cuda
