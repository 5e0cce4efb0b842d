// Ops fused_peft::lora_linear, lora_update and their backward passes for the CPU: tensors to
// params, checks, launch. Written against torch's stable ABI, so one binary serves every torch
// >= 2.10.
#include "kernels/lora_linear.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "binding/cpu_isa.h"
#include "binding/lora_operands.h"

namespace fused_peft {
namespace {

void check_cpu(const Tensor& x) { STD_TORCH_CHECK(x.is_cpu(), "fused_peft: x must be on the CPU"); }

std::tuple<Tensor, Tensor> launch_forward(LoraLinearForward& args, const Tensor& x,
                                          const std::optional<Tensor>& seed, const char* name) {
  check_cpu(x);
  args.problem.seed = seed_of(seed, args.problem.dropout_p);
  const Outputs out = allocate_outputs(args, x);
  check_status(cpu::lora_linear_forward(args, cpu::chosen_isa(), torch_threads()), name);
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                       const Tensor& lora_b, std::optional<Tensor> bias,
                                       double scaling, double dropout_p,
                                       std::optional<Tensor> seed) {
  const Operands o = gather(x, weight, lora_a, lora_b, scaling, dropout_p);
  LoraLinearForward args;
  args.problem = o.params;
  Tensor bias_rows;
  args.problem.bias = bias_view(bias, o, x, &bias_rows);
  return launch_forward(args, x, seed, "lora_linear");
}

std::tuple<Tensor, Tensor> lora_update(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                                       const Tensor& lora_b, double scaling, double dropout_p,
                                       std::optional<Tensor> seed) {
  const Operands o = gather(x, lora_a, lora_b, scaling, dropout_p);
  LoraLinearForward args;
  args.problem = o.params;
  args.problem.bias = {nullptr, 0, 1, o.params.x.dtype};
  STD_TORCH_CHECK(
      base.dim() >= 1 && base.size(base.dim() - 1) == o.params.n && same_device(base, x),
      "fused_peft: base must be [..., N] on x's device");
  const Rows base_rows = as_rows(base, "base");
  STD_TORCH_CHECK(base_rows.count == o.params.m,
                  "fused_peft: base and x have different leading dimensions");
  STD_TORCH_CHECK(base_rows.view.dtype == o.params.x.dtype,
                  "fused_peft: base's dtype differs from x's");
  args.base = base_rows.view;
  return launch_forward(args, x, seed, "lora_update");
}

Gradients launch_backward(Operands& o, const std::optional<Tensor>& seed, const Tensor& dy,
                          const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                          const Tensor& s, bool need_dx, bool need_dlora_a, bool need_dlora_b,
                          bool need_dbias, const char* name) {
  check_cpu(x);
  o.params.seed = seed_of(seed, o.params.dropout_p);
  const BackwardJob job = prepare_backward(o, dy, x, lora_a, lora_b, s, need_dx, need_dlora_a,
                                           need_dlora_b, need_dbias);
  check_status(cpu::lora_linear_backward(job.args, cpu::chosen_isa(), torch_threads()), name);
  return job.gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& s, double scaling, double dropout_p,
    std::optional<Tensor> seed, bool need_dx, bool need_dlora_a, bool need_dlora_b,
    bool need_dbias) {
  Operands o = gather(x, weight, lora_a, lora_b, scaling, dropout_p);
  const Gradients g = launch_backward(o, seed, dy, x, lora_a, lora_b, s, need_dx, need_dlora_a,
                                      need_dlora_b, need_dbias, "lora_linear_backward");
  return {g.dx, g.dlora_a, g.dlora_b, g.dbias};
}

std::tuple<Tensor, Tensor, Tensor> lora_update_backward(const Tensor& dy, const Tensor& x,
                                                        const Tensor& lora_a, const Tensor& lora_b,
                                                        const Tensor& s, double scaling,
                                                        double dropout_p,
                                                        std::optional<Tensor> seed, bool need_dx,
                                                        bool need_dlora_a, bool need_dlora_b) {
  Operands o = gather(x, lora_a, lora_b, scaling, dropout_p);
  const Gradients g = launch_backward(o, seed, dy, x, lora_a, lora_b, s, need_dx, need_dlora_a,
                                      need_dlora_b, false, "lora_update_backward");
  return {g.dx, g.dlora_a, g.dlora_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_peft, m) {
  define_lora_linear(m);
  m.def(
      "lora_update(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, "
      "float dropout_p, Tensor? seed) -> (Tensor y, Tensor s)");
  m.def(
      "lora_update_backward(Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, Tensor s, "
      "float scaling, float dropout_p, Tensor? seed, bool need_dx, bool need_dlora_a, "
      "bool need_dlora_b) -> (Tensor dx, Tensor dlora_a, Tensor dlora_b)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_peft, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_update", TORCH_BOX(&lora_update));
  m.impl("lora_update_backward", TORCH_BOX(&lora_update_backward));
}

}  // namespace fused_peft
