// Ops fused_peft::lora_linear and fused_peft::lora_linear_backward for the CPU: tensors to params,
// checks, launch. Written against torch's stable ABI, so one binary serves every torch >= 2.10.
#include "kernels/lora_linear.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "binding/cpu_isa.h"
#include "binding/tensors.h"

namespace fused_peft {
namespace {

void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols,
                  "fused_peft: ", name, " has the wrong shape; expected [", rows, ", ", cols, "]");
  STD_TORCH_CHECK(tensor.is_cpu(), "fused_peft: ", name, " is not on the CPU, where x is");
}

MatrixView view_matrix(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor, name)};
}

// A matrix whose rows are contiguous; a copy where they are not.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// [..., C] as rows: in place where the leading dimensions collapse into one stride, else a copy.
struct Rows {
  Tensor tensor;
  MatrixView view;
  int64_t count = 1;
};

Rows as_rows(const Tensor& tensor, const char* name) {
  Rows rows{tensor, {}, 1};
  const int64_t dim = tensor.dim();
  bool collapses = tensor.stride(dim - 1) == 1 || tensor.size(dim - 1) == 1;
  int64_t row_stride = tensor.size(dim - 1);
  bool seen = false;
  for (int64_t d = dim - 2; d >= 0; --d) {
    if (tensor.size(d) != 1) {
      if (!seen) row_stride = tensor.stride(d);
      collapses = collapses && (!seen || tensor.stride(d) == row_stride * rows.count);
      seen = true;
    }
    rows.count *= tensor.size(d);
  }
  // An expanded x (stride 0) is one row many times: as good as any other stride.
  if (!collapses) {
    rows.tensor = torch::stable::contiguous(tensor);
    row_stride = tensor.size(dim - 1);
  }
  rows.view = {rows.tensor.const_data_ptr(), row_stride, 1, dtype_of(tensor, name)};
  return rows;
}

std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

// The operands of both passes, with copies of those that no kernel reads in place.
struct Operands {
  Rows x;
  Tensor weight, lora_a, lora_b;
  LoraLinearParams params;
};

Operands gather(const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                double scaling, double dropout_p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu(), "fused_peft: x must be [..., K] on the CPU");
  STD_TORCH_CHECK(weight.dim() == 2 && lora_a.dim() == 2,
                  "fused_peft: weight must be [N, K] and lora_a [R, K]");
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "fused_peft: dropout_p is ", dropout_p,
                  "; expected 0 <= dropout_p < 1");
  const int64_t k = x.size(x.dim() - 1);
  const int64_t n = weight.size(0);
  const int64_t r = lora_a.size(0);
  check_matrix(weight, "weight", n, k);
  check_matrix(lora_a, "lora_a", r, k);
  check_matrix(lora_b, "lora_b", n, r);
  const bool weight_in_place = weight.stride(0) == 1 || weight.stride(1) == 1;
  Operands o{as_rows(x, "x"),
             weight_in_place ? weight : torch::stable::contiguous(weight),
             with_contiguous_rows(lora_a),
             with_contiguous_rows(lora_b),
             {}};
  LoraLinearParams& p = o.params;
  p.m = o.x.count;
  p.n = n;
  p.k = k;
  p.r = r;
  p.x = o.x.view;
  p.weight = view_matrix(o.weight, "weight");
  p.lora_a = view_matrix(o.lora_a, "lora_a");
  p.lora_b = view_matrix(o.lora_b, "lora_b");
  if (k == 1) p.lora_a.col_stride = 1;
  if (k == 1) p.weight = {p.weight.data, p.weight.row_stride, 1, p.weight.dtype};
  if (r == 1) p.lora_b.col_stride = 1;
  STD_TORCH_CHECK(p.weight.dtype == p.x.dtype, "fused_peft: weight's dtype differs from x's");
  for (const MatrixView& adapter : {p.lora_a, p.lora_b})
    STD_TORCH_CHECK(adapter.dtype == p.x.dtype || adapter.dtype == DType::kFloat32,
                    "fused_peft: lora_a and lora_b must have x's dtype or float32");
  p.scaling = scaling;
  p.dropout_p = dropout_p;
  p.seed = seed_of(seed, dropout_p);
  return o;
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                       const Tensor& lora_b, std::optional<Tensor> bias,
                                       double scaling, double dropout_p,
                                       std::optional<Tensor> seed) {
  const Operands o = gather(x, weight, lora_a, lora_b, scaling, dropout_p, seed);
  LoraLinearForward args;
  args.problem = o.params;
  Tensor bias_rows;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == o.params.n && bias->is_cpu(),
                    "fused_peft: bias has the wrong shape; expected [", o.params.n, "]");
    bias_rows = torch::stable::contiguous(*bias);
    args.problem.bias = {bias_rows.const_data_ptr(), 0, 1, dtype_of(bias_rows, "bias")};
    STD_TORCH_CHECK(args.problem.bias.dtype == o.params.x.dtype,
                    "fused_peft: bias's dtype differs from x's");
  }
  Tensor y = torch::stable::new_empty(x, with_last(x, o.params.n));
  Tensor s = torch::stable::new_empty(x, with_last(x, o.params.r), ScalarType::Float);
  args.y = y.mutable_data_ptr();
  args.y_row_stride = o.params.n;
  args.s = static_cast<float*>(s.mutable_data_ptr());
  check_status(cpu::lora_linear_forward(args, cpu::chosen_isa(), torch_threads()), "lora_linear");
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& s, double scaling, double dropout_p,
    std::optional<Tensor> seed, bool need_dx, bool need_dlora_a, bool need_dlora_b,
    bool need_dbias) {
  const Operands o = gather(x, weight, lora_a, lora_b, scaling, dropout_p, seed);
  const LoraLinearParams& p = o.params;
  STD_TORCH_CHECK(dy.dim() >= 1 && dy.size(dy.dim() - 1) == p.n && dy.is_cpu(),
                  "fused_peft: dy must be [..., N] on the CPU");
  STD_TORCH_CHECK(s.numel() == p.m * p.r && s.scalar_type() == ScalarType::Float && s.is_cpu(),
                  "fused_peft: s must be the float32 [..., R] of the forward pass");
  const Rows dy_rows = as_rows(dy, "dy");
  STD_TORCH_CHECK(dy_rows.count == p.m, "fused_peft: dy and x have different leading dimensions");
  const Tensor s_rows = torch::stable::contiguous(s);
  LoraLinearBackward args;
  args.problem = p;
  args.problem.bias = {nullptr, 0, 1, p.x.dtype};
  args.dy = dy_rows.view;
  args.s = static_cast<const float*>(s_rows.const_data_ptr());
  // What is not asked for is an empty tensor: a schema has no optional outputs.
  const auto output = [&](bool needed, const Tensor& like, std::vector<int64_t> shape,
                          void*& pointer) {
    Tensor out = torch::stable::new_empty(like, needed ? shape : std::vector<int64_t>{0});
    if (needed) pointer = out.mutable_data_ptr();
    return out;
  };
  Tensor dx = output(need_dx, x, with_last(x, p.k), args.dx);
  Tensor dlora_a = output(need_dlora_a, lora_a, {p.r, p.k}, args.dlora_a);
  Tensor dlora_b = output(need_dlora_b, lora_b, {p.n, p.r}, args.dlora_b);
  Tensor dbias = output(need_dbias, x, {p.n}, args.dbias);
  check_status(cpu::lora_linear_backward(args, cpu::chosen_isa(), torch_threads()),
               "lora_linear_backward");
  return {dx, dlora_a, dlora_b, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_peft, m) {
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
      "float scaling, float dropout_p, Tensor? seed) -> (Tensor y, Tensor s)");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor s, float scaling, float dropout_p, Tensor? seed, bool need_dx, bool need_dlora_a, "
      "bool need_dlora_b, bool need_dbias) "
      "-> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_peft, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace fused_peft
