// The LoRA layer on the GPU: which kernels, in what order, on which operands. See
// lora_linear_config.h for the choice.
#include "kernels/lora_linear_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/instances.h"

namespace fused_peft::cuda {
namespace {

bool aligned16(const void* data, int64_t row_stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % kChunk == 0 &&
         columns % kChunk == 0;
}
bool aligned16_float(const void* data, int64_t row_stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % 4 == 0 && columns % 4 == 0;
}

bool weight_k_major(const LoraLinearParams& p) { return p.weight.col_stride == 1; }
int64_t weight_stride(const LoraLinearParams& p) {
  return weight_k_major(p) ? p.weight.row_stride : p.weight.col_stride;
}
bool aligned_weight(const LoraLinearParams& p) {
  return aligned16(p.weight.data, weight_stride(p), weight_k_major(p) ? p.k : p.n);
}
bool factor_float(const LoraLinearParams& p) { return p.lora_a.dtype == DType::kFloat32; }
int segments_of(const LoraLinearParams& p) { return factor_float(p) ? kSegments : 1; }
// Columns of the GEMM's second reduction.
int64_t term_columns(const LoraLinearParams& p) { return segment_columns(p.r) * segments_of(p); }

// The factor that is the second source's b, [outer, R] by its strides: used in place where its rows
// suit the GEMM, else a copy.
struct FactorOperand {
  FactorCopy copy;
  GemmSource source;  // b, b_stride, b_aligned, k
};

FactorOperand factor_operand(const LoraLinearParams& p, const MatrixView& factor, int64_t outer,
                             bool reduced_is_row, bool k_major, Workspace* workspace) {
  FactorOperand operand;
  const int64_t outer_stride = reduced_is_row ? factor.col_stride : factor.row_stride;
  const int64_t reduced_stride = reduced_is_row ? factor.row_stride : factor.col_stride;
  const bool in_place =
      !factor_float(p) &&
      (k_major ? reduced_stride == 1 && aligned16(factor.data, outer_stride, p.r)
               : outer_stride == 1 && aligned16(factor.data, reduced_stride, outer));
  if (in_place) {
    operand.source.b = factor.data;
    operand.source.b_stride = k_major ? outer_stride : reduced_stride;
    operand.source.k = static_cast<int32_t>(p.r);
  } else {
    const int64_t outer_padded = (outer + kChunk - 1) / kChunk * kChunk;
    FactorCopy& copy = operand.copy;
    copy.source = factor.data;
    copy.source_float = factor_float(p);
    copy.outer = outer;
    copy.reduced = p.r;
    copy.outer_stride = outer_stride;
    copy.reduced_stride = reduced_stride;
    copy.target_stride = k_major ? term_columns(p) : outer_padded;
    copy.target = workspace->take((k_major ? outer : term_columns(p)) * copy.target_stride * 2);
    copy.k_major = k_major;
    copy.segments = segments_of(p);
    operand.source.b = copy.target;
    operand.source.b_stride = copy.target_stride;
    operand.source.k = static_cast<int32_t>(term_columns(p));
  }
  operand.source.b_aligned = true;
  return operand;
}

// s or ds as the GEMM's operand.
TermsOut take_terms(const LoraLinearParams& p, Workspace* workspace) {
  const int64_t stride = term_columns(p);
  return {workspace->take(p.m * stride * 2), stride, segments_of(p)};
}

// The GEMM's product over the frozen weight: (x, W) or (dy, W^T).
GemmSource base_source(const LoraLinearParams& p, const MatrixView& a, int64_t k) {
  GemmSource source;
  source.a = a.data;
  source.a_stride = a.row_stride;
  source.a_aligned = aligned16(a.data, a.row_stride, k);
  source.b = p.weight.data;
  source.b_stride = weight_stride(p);
  source.b_aligned = aligned_weight(p);
  source.k = static_cast<int32_t>(k);
  return source;
}

// Its low-rank product: (s, lora_b) or (ds, lora_a).
GemmSource update_source(const FactorOperand& factor, const TermsOut& terms) {
  GemmSource source = factor.source;
  source.a = terms.data;
  source.a_stride = terms.stride;
  source.a_aligned = true;
  return source;
}

int64_t copy_ctas(const FactorCopy& copy, int threads) {
  if (!copy.source) return 0;
  const int64_t elements =
      (copy.k_major ? copy.outer * copy.target_stride
                    : copy.target_stride * segment_columns(copy.reduced) * copy.segments);
  return ceil_div(elements, threads * 8);
}

SkinnyRows rows_of(const MatrixView& view, int64_t rows, int64_t columns) {
  const bool aligned = view.dtype == DType::kFloat32
                           ? aligned16_float(view.data, view.row_stride, columns)
                           : aligned16(view.data, view.row_stride, columns);
  return {view.data, view.row_stride, rows, aligned};
}

Dropout dropout_of(const LoraLinearParams& p, const LaunchContext& context) {
  if (p.dropout_p <= 0.0) return {};
  const double threshold = p.dropout_p * 4294967296.0 + 0.5;
  return {context.seed, threshold >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(threshold)};
}

double scaling_of(const LoraLinearParams& p) { return p.scaling / (1.0 - p.dropout_p); }

template <class Element>
Status run_gemm(const GemmVariant& variant, const GemmParams& gemm, const LaunchContext& context,
                bool dependent) {
#ifdef FUSED_PEFT_SM90A
  if (variant.choice.kernel != GemmKernel::kSm80)
    return launch_gemm_sm90<Element>(variant, gemm, context, dependent);
#endif
  return launch_gemm<Element>(variant, gemm, context, dependent);
}

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

template <template <class, class> class Run, class Args>
Status dispatch(const Args& args, const LoraLinearPlan& plan, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  if (p.x.dtype == DType::kBFloat16)
    return factor_float(p) ? Run<__nv_bfloat16, float>::run(args, plan, context)
                           : Run<__nv_bfloat16, __nv_bfloat16>::run(args, plan, context);
  return factor_float(p) ? Run<__half, float>::run(args, plan, context)
                         : Run<__half, __half>::run(args, plan, context);
}

template <class Element, class Factor>
struct RunForward {
  static Status run(const LoraLinearForward& args, const LoraLinearPlan& plan,
                    const LaunchContext& context) {
    return forward<Element, Factor>(args, plan, context);
  }
};
template <class Element, class Factor>
struct RunBackward {
  static Status run(const LoraLinearBackward& args, const LoraLinearPlan& plan,
                    const LaunchContext& context) {
    return backward<Element, Factor>(args, plan, context);
  }
};

}  // namespace

LoraLinearShape shape_of(const LoraLinearParams& p) {
  LoraLinearShape shape;
  shape.m = p.m;
  shape.n = p.n;
  shape.k = p.k;
  shape.r = p.r;
  shape.factor_float = factor_float(p);
  shape.dropout = p.dropout_p > 0.0;
  shape.weight_k_major = weight_k_major(p);
  shape.aligned =
      aligned16(p.x.data, p.x.row_stride, p.k) && aligned_weight(p) && p.n % kChunk == 0;
  shape.lora_a_aligned = rows_of(p.lora_a, p.r, p.k).aligned;
  shape.lora_b_aligned = rows_of(p.lora_b, p.n, p.r).aligned;
  return shape;
}

namespace {

LoraLinearPlan forward_plan(const LoraLinearForward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  LoraLinearShape shape = shape_of(p);
  shape.aligned = shape.aligned && aligned16(args.y, args.y_row_stride, p.n);
  shape.single_launch_state = context.single_launch_state != nullptr;
  return plan_lora_linear(shape, context.device);
}

LoraLinearPlan backward_plan(const LoraLinearBackward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  LoraLinearShape shape = shape_of(p);
  shape.aligned = shape.aligned && aligned16(args.dy.data, args.dy.row_stride, p.n) &&
                  (!args.dx || aligned16(args.dx, p.k, p.k)) && aligned16(args.s, 0, 0);
  shape.single_launch_state = context.single_launch_state != nullptr;
  shape.dx = args.dx != nullptr;
  return plan_lora_linear(shape, context.device);
}

}  // namespace

bool supports(const LoraLinearParams& p) {
  if (p.x.dtype != DType::kBFloat16 && p.x.dtype != DType::kFloat16) return false;
  if (p.lora_a.dtype != p.lora_b.dtype) return false;
  if (p.lora_a.dtype != p.x.dtype && p.lora_a.dtype != DType::kFloat32) return false;
  constexpr int64_t kLargest = 0x7fffffff - 128;  // of K, N: counted in 32 bits inside a row
  return p.r >= 1 && p.r <= kMaxRank && p.n <= kLargest && p.k <= kLargest;
}

int64_t forward_workspace_bytes(const LoraLinearForward& args, const LaunchContext& context) {
  Workspace workspace(nullptr);
  plan_forward(args.problem, forward_plan(args, context), &workspace);
  return workspace.used();
}

int64_t backward_workspace_bytes(const LoraLinearBackward& args, const LaunchContext& context) {
  Workspace workspace(nullptr);
  plan_backward(args, backward_plan(args, context), &workspace);
  return workspace.used();
}

Status lora_linear_forward(const LoraLinearForward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  if (!supports(p)) return Status::kUnsupported;
  if (p.m == 0) return Status::kOk;
  return dispatch<RunForward>(args, forward_plan(args, context), context);
}

Status lora_linear_backward(const LoraLinearBackward& args, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  if (!supports(p)) return Status::kUnsupported;
  if (p.m == 0) return clear_gradients(args, context);
  return dispatch<RunBackward>(args, backward_plan(args, context), context);
}

}  // namespace fused_peft::cuda
