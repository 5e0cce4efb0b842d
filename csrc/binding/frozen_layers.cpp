// Ops rms_norm, swiglu and cross_entropy of namespace fused_peft, with their backward passes, for
// the CPU: tensors to params, checks, launch. Written against torch's stable ABI.
#include "kernels/frozen_layers.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "binding/cpu_isa.h"
#include "binding/tensors.h"

namespace fused_peft {
namespace {

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

void check_like(const Tensor& tensor, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(shape_of(tensor) == shape_of(other) &&
                      tensor.scalar_type() == other.scalar_type() && tensor.is_cpu(),
                  "fused_peft: ", name, " must have the shape and dtype of the first operand");
}

struct NormOperands {
  Tensor x, weight;
  RmsNorm params;
};

NormOperands norm_operands(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu() && weight.is_cpu() && weight.dim() == 1 &&
                      weight.size(0) == x.size(x.dim() - 1),
                  "fused_peft: x must be [..., H] and weight [H] on the CPU");
  NormOperands o{torch::stable::contiguous(x), torch::stable::contiguous(weight), {}};
  RmsNorm& p = o.params;
  p.h = weight.size(0);
  p.m = p.h == 0 ? 0 : x.numel() / p.h;
  p.x = {o.x.const_data_ptr(), p.h, 1, dtype_of(x, "x")};
  p.weight = {o.weight.const_data_ptr(), 0, 1, dtype_of(weight, "weight")};
  STD_TORCH_CHECK(p.weight.dtype == p.x.dtype || p.weight.dtype == DType::kFloat32,
                  "fused_peft: weight must have x's dtype or float32");
  return o;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  NormOperands o = norm_operands(x, weight);
  std::vector<int64_t> rows = shape_of(x);
  rows.pop_back();
  Tensor y = torch::stable::new_empty(x, shape_of(x));
  Tensor rstd = torch::stable::new_empty(x, rows, ScalarType::Double);
  o.params.eps = eps;
  o.params.y = y.mutable_data_ptr();
  o.params.rstd = static_cast<double*>(rstd.mutable_data_ptr());
  check_status(cpu::rms_norm_forward(o.params, cpu::chosen_isa(), torch_threads()), "rms_norm");
  return {y, rstd};
}

Tensor rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                         const Tensor& rstd) {
  NormOperands o = norm_operands(x, weight);
  check_like(dy, "dy", x);
  STD_TORCH_CHECK(rstd.numel() == o.params.m && rstd.scalar_type() == ScalarType::Double,
                  "fused_peft: rstd must be the [...] of the forward pass");
  const Tensor dy_rows = torch::stable::contiguous(dy);
  Tensor rstd_rows = torch::stable::contiguous(rstd);
  Tensor dx = torch::stable::new_empty(x, shape_of(x));
  o.params.dy = {dy_rows.const_data_ptr(), o.params.h, 1, o.params.x.dtype};
  o.params.rstd = static_cast<double*>(rstd_rows.mutable_data_ptr());
  o.params.dx = dx.mutable_data_ptr();
  check_status(cpu::rms_norm_backward(o.params, cpu::chosen_isa(), torch_threads()),
               "rms_norm_backward");
  return dx;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  STD_TORCH_CHECK(gate.is_cpu(), "fused_peft: gate is not on the CPU");
  check_like(up, "up", gate);
  const Tensor gate_in = torch::stable::contiguous(gate), up_in = torch::stable::contiguous(up);
  Tensor y = torch::stable::new_empty(gate, shape_of(gate));
  SwiGlu args;
  args.n = gate.numel();
  args.dtype = dtype_of(gate, "gate");
  args.gate = gate_in.const_data_ptr();
  args.up = up_in.const_data_ptr();
  args.y = y.mutable_data_ptr();
  check_status(cpu::swiglu_forward(args, cpu::chosen_isa(), torch_threads()), "swiglu");
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  STD_TORCH_CHECK(gate.is_cpu(), "fused_peft: gate is not on the CPU");
  check_like(up, "up", gate);
  check_like(dy, "dy", gate);
  const Tensor gate_in = torch::stable::contiguous(gate), up_in = torch::stable::contiguous(up);
  const Tensor dy_in = torch::stable::contiguous(dy);
  Tensor dgate = torch::stable::new_empty(gate, shape_of(gate));
  Tensor dup = torch::stable::new_empty(gate, shape_of(gate));
  SwiGlu args;
  args.n = gate.numel();
  args.dtype = dtype_of(gate, "gate");
  args.gate = gate_in.const_data_ptr();
  args.up = up_in.const_data_ptr();
  args.dy = dy_in.const_data_ptr();
  args.dgate = dgate.mutable_data_ptr();
  args.dup = dup.mutable_data_ptr();
  check_status(cpu::swiglu_backward(args, cpu::chosen_isa(), torch_threads()), "swiglu_backward");
  return {dgate, dup};
}

struct LossOperands {
  Tensor logits, labels;
  CrossEntropy params;
};

LossOperands loss_operands(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
  STD_TORCH_CHECK(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0) &&
                      labels.scalar_type() == ScalarType::Long && logits.is_cpu() &&
                      labels.is_cpu(),
                  "fused_peft: logits must be [M, V] and labels int64 [M] on the CPU");
  const bool in_place = logits.stride(1) == 1 || logits.size(1) == 1;
  LossOperands o{
      in_place ? logits : torch::stable::contiguous(logits), torch::stable::contiguous(labels), {}};
  CrossEntropy& p = o.params;
  p.m = logits.size(0);
  p.v = logits.size(1);
  p.logits = {o.logits.const_data_ptr(), o.logits.stride(0), 1, dtype_of(logits, "logits")};
  p.labels = static_cast<const int64_t*>(o.labels.const_data_ptr());
  p.ignore_index = ignore_index;
  for (int64_t i = 0; i < p.m; ++i)
    STD_TORCH_CHECK((p.labels[i] >= 0 && p.labels[i] < p.v) || p.labels[i] == ignore_index,
                    "fused_peft: labels holds ", p.labels[i], " at ", i, "; expected 0 to ",
                    p.v - 1, " or ignore_index ", ignore_index);
  return o;
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& labels,
                                         int64_t ignore_index) {
  LossOperands o = loss_operands(logits, labels, ignore_index);
  Tensor loss = torch::stable::new_empty(logits, {o.params.m}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {o.params.m}, ScalarType::Double);
  o.params.loss = static_cast<float*>(loss.mutable_data_ptr());
  o.params.lse = static_cast<double*>(lse.mutable_data_ptr());
  check_status(cpu::cross_entropy_forward(o.params, cpu::chosen_isa(), torch_threads()),
               "cross_entropy");
  return {loss, lse};
}

Tensor cross_entropy_backward(const Tensor& dloss, const Tensor& logits, const Tensor& labels,
                              const Tensor& lse, int64_t ignore_index) {
  LossOperands o = loss_operands(logits, labels, ignore_index);
  const auto rows_of = [&](const Tensor& t, ScalarType type) {
    return t.dim() == 1 && t.size(0) == o.params.m && t.is_cpu() && t.scalar_type() == type;
  };
  STD_TORCH_CHECK(rows_of(dloss, ScalarType::Float) && rows_of(lse, ScalarType::Double),
                  "fused_peft: dloss must be float32 [M] and lse the [M] of the forward pass");
  Tensor lse_rows = torch::stable::contiguous(lse);
  Tensor dlogits = torch::stable::new_empty(logits, {o.params.m, o.params.v});
  o.params.lse = static_cast<double*>(lse_rows.mutable_data_ptr());
  o.params.dloss = static_cast<const float*>(dloss.const_data_ptr());
  o.params.dloss_stride = dloss.stride(0);
  o.params.dlogits = dlogits.mutable_data_ptr();
  check_status(cpu::cross_entropy_backward(o.params, cpu::chosen_isa(), torch_threads()),
               "cross_entropy_backward");
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_peft, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
  m.def(
      "cross_entropy(Tensor logits, Tensor labels, int ignore_index) -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, "
      "int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_peft, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace fused_peft
