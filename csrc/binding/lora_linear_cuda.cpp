// Ops fused_peft::lora_linear and its backward pass for CUDA.
#include "kernels/lora_linear_cuda.h"

#include <torch/csrc/stable/library.h>

#include "binding/cuda_device.h"
#include "binding/lora_operands.h"

namespace fused_peft {
namespace {

void read_operands(DeviceScope& scope, const Operands& o) {
  scope.reads(o.x.tensor);
  scope.reads(o.weight);
  scope.reads(o.lora_a);
  scope.reads(o.lora_b);
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                       const Tensor& lora_b, std::optional<Tensor> bias,
                                       double scaling, double dropout_p,
                                       std::optional<Tensor> seed) {
  DeviceScope scope(x);
  const Operands o = gather(x, weight, lora_a, lora_b, scaling, dropout_p);
  LoraLinearForward args;
  args.problem = o.params;
  Tensor bias_rows;
  args.problem.bias = bias_view(bias, o, x, &bias_rows);
  const Outputs out = allocate_outputs(args, x);
  read_operands(scope, o);
  if (bias.has_value()) scope.reads(bias_rows);
  scope.writes(out.y);
  scope.writes(out.s);
  cuda::LaunchContext& context = scope.context();
  context.seed = scope.seed(seed, dropout_p, x);
  context.single_launch_state = scope.single_launch_state(x);
  context.workspace = scope.workspace(x, cuda::forward_workspace_bytes(args, context));
  check_launch_status(cuda::lora_linear_forward(args, context), "lora_linear");
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& s, double scaling, double dropout_p,
    std::optional<Tensor> seed, bool need_dx, bool need_dlora_a, bool need_dlora_b,
    bool need_dbias) {
  DeviceScope scope(x);
  const Operands o = gather(x, weight, lora_a, lora_b, scaling, dropout_p);
  const BackwardJob job = prepare_backward(o, dy, x, lora_a, lora_b, s, need_dx, need_dlora_a,
                                           need_dlora_b, need_dbias);
  read_operands(scope, o);
  scope.reads(job.dy.tensor);
  scope.reads(job.s);
  for (const Tensor* gradient :
       {&job.gradients.dx, &job.gradients.dlora_a, &job.gradients.dlora_b, &job.gradients.dbias})
    scope.writes(*gradient);
  cuda::LaunchContext& context = scope.context();
  context.seed = scope.seed(seed, dropout_p, x);
  context.single_launch_state = scope.single_launch_state(x);
  context.workspace = scope.workspace(x, cuda::backward_workspace_bytes(job.args, context));
  check_launch_status(cuda::lora_linear_backward(job.args, context), "lora_linear_backward");
  const Gradients& g = job.gradients;
  return {g.dx, g.dlora_a, g.dlora_b, g.dbias};
}

}  // namespace

#ifdef FUSED_PEFT_SIMULATED_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fused_peft_simulated, m) { define_lora_linear(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(FUSED_PEFT_CUDA_NAMESPACE, FUSED_PEFT_CUDA_KEY, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace fused_peft
