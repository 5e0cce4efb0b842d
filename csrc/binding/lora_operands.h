// Operands of the LoRA ops on any device: tensors to params, checks, outputs.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "binding/tensors.h"
#include "kernels/lora_linear.h"

namespace fused_peft {

// The schemas, of the package's library and of the one that runs under the simulator.
template <class Library>
void define_lora_linear(Library& m) {
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
      "float scaling, float dropout_p, Tensor? seed) -> (Tensor y, Tensor s)");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor s, float scaling, float dropout_p, Tensor? seed, bool need_dx, bool need_dlora_a, "
      "bool need_dlora_b, bool need_dbias) "
      "-> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dbias)");
}

inline void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t cols,
                         const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols,
                  "fused_peft: ", name, " has the wrong shape; expected [", rows, ", ", cols, "]");
  STD_TORCH_CHECK(same_device(tensor, x), "fused_peft: ", name, " is not on x's device");
}

inline MatrixView view_matrix(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor, name)};
}

// A matrix whose rows are contiguous; a copy where they are not.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// [..., C] as rows: in place where the leading dimensions collapse into one stride, else a copy.
struct Rows {
  Tensor tensor;
  MatrixView view;
  int64_t count = 1;
};

inline Rows as_rows(const Tensor& tensor, const char* name) {
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

inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
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

// All but the weight.
inline Operands gather(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, double scaling,
                       double dropout_p) {
  STD_TORCH_CHECK(x.dim() >= 1, "fused_peft: x must be [..., K]");
  STD_TORCH_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2,
                  "fused_peft: lora_a must be [R, K] and lora_b [N, R]");
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "fused_peft: dropout_p is ", dropout_p,
                  "; expected 0 <= dropout_p < 1");
  const int64_t k = x.size(x.dim() - 1);
  const int64_t n = lora_b.size(0);
  const int64_t r = lora_a.size(0);
  check_matrix(lora_a, "lora_a", r, k, x);
  check_matrix(lora_b, "lora_b", n, r, x);
  Operands o{as_rows(x, "x"), {}, with_contiguous_rows(lora_a), with_contiguous_rows(lora_b), {}};
  LoraLinearParams& p = o.params;
  p.m = o.x.count;
  p.n = n;
  p.k = k;
  p.r = r;
  p.x = o.x.view;
  p.lora_a = view_matrix(o.lora_a, "lora_a");
  p.lora_b = view_matrix(o.lora_b, "lora_b");
  if (k == 1) p.lora_a.col_stride = 1;
  if (r == 1) p.lora_b.col_stride = 1;
  for (const MatrixView& adapter : {p.lora_a, p.lora_b})
    STD_TORCH_CHECK(adapter.dtype == p.x.dtype || adapter.dtype == DType::kFloat32,
                    "fused_peft: lora_a and lora_b must have x's dtype or float32");
  p.scaling = scaling;
  p.dropout_p = dropout_p;
  return o;
}

inline Operands gather(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                       const Tensor& lora_b, double scaling, double dropout_p) {
  Operands o = gather(x, lora_a, lora_b, scaling, dropout_p);
  LoraLinearParams& p = o.params;
  check_matrix(weight, "weight", p.n, p.k, x);
  const bool in_place = weight.stride(0) == 1 || weight.stride(1) == 1;
  o.weight = in_place ? weight : torch::stable::contiguous(weight);
  p.weight = view_matrix(o.weight, "weight");
  if (p.k == 1) p.weight.col_stride = 1;
  STD_TORCH_CHECK(p.weight.dtype == p.x.dtype, "fused_peft: weight's dtype differs from x's");
  return o;
}

// The bias as the kernels take it; `holder` keeps a contiguous copy alive.
inline MatrixView bias_view(const std::optional<Tensor>& bias, const Operands& o, const Tensor& x,
                            Tensor* holder) {
  if (!bias.has_value()) return {nullptr, 0, 1, o.params.x.dtype};
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == o.params.n && same_device(*bias, x),
                  "fused_peft: bias has the wrong shape or device; expected [", o.params.n, "]");
  *holder = torch::stable::contiguous(*bias);
  const MatrixView view = {holder->const_data_ptr(), 0, 1, dtype_of(*holder, "bias")};
  STD_TORCH_CHECK(view.dtype == o.params.x.dtype, "fused_peft: bias's dtype differs from x's");
  return view;
}

struct Outputs {
  Tensor y, s;
};

// y and s of the forward pass, allocated; the rest of args is set already.
inline Outputs allocate_outputs(LoraLinearForward& args, const Tensor& x) {
  const LoraLinearParams& p = args.problem;
  Outputs out{torch::stable::new_empty(x, with_last(x, p.n)),
              torch::stable::new_empty(x, with_last(x, p.r), ScalarType::Float)};
  args.y = out.y.mutable_data_ptr();
  args.y_row_stride = p.n;
  args.s = static_cast<float*>(out.s.mutable_data_ptr());
  return out;
}

struct Gradients {
  Tensor dx, dlora_a, dlora_b, dbias;
};

// A backward pass ready to launch: checked, its outputs allocated.
struct BackwardJob {
  LoraLinearBackward args;
  Rows dy;
  Tensor s;
  Gradients gradients;
};

inline BackwardJob prepare_backward(const Operands& o, const Tensor& dy, const Tensor& x,
                                    const Tensor& lora_a, const Tensor& lora_b, const Tensor& s,
                                    bool need_dx, bool need_dlora_a, bool need_dlora_b,
                                    bool need_dbias) {
  const LoraLinearParams& p = o.params;
  STD_TORCH_CHECK(dy.dim() >= 1 && dy.size(dy.dim() - 1) == p.n && same_device(dy, x),
                  "fused_peft: dy must be [..., N] on x's device");
  STD_TORCH_CHECK(
      s.numel() == p.m * p.r && s.scalar_type() == ScalarType::Float && same_device(s, x),
      "fused_peft: s must be the float32 [..., R] of the forward pass");
  BackwardJob job{{}, as_rows(dy, "dy"), torch::stable::contiguous(s), {}};
  STD_TORCH_CHECK(job.dy.count == p.m, "fused_peft: dy and x have different leading dimensions");
  LoraLinearBackward& args = job.args;
  args.problem = p;
  args.problem.bias = {nullptr, 0, 1, p.x.dtype};
  args.dy = job.dy.view;
  args.s = static_cast<const float*>(job.s.const_data_ptr());
  // What is not asked for is an empty tensor: a schema has no optional outputs.
  const auto output = [&](bool needed, const Tensor& like, std::vector<int64_t> shape,
                          void*& pointer) {
    Tensor out = torch::stable::new_empty(like, needed ? shape : std::vector<int64_t>{0});
    if (needed) pointer = out.mutable_data_ptr();
    return out;
  };
  job.gradients = {output(need_dx, x, with_last(x, p.k), args.dx),
                   output(need_dlora_a, lora_a, {p.r, p.k}, args.dlora_a),
                   output(need_dlora_b, lora_b, {p.n, p.r}, args.dlora_b),
                   output(need_dbias, x, {p.n}, args.dbias)};
  return job;
}

}  // namespace fused_peft
