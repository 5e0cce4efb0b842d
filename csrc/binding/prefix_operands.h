// Operands of prefix attention on any device: tensors to params, checks, outputs.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "binding/tensors.h"
#include "kernels/prefix_attention.h"

namespace fused_peft::attention {

// The schemas, of the package's library and of the one that runs under the simulator.
template <class Library>
void define(Library& m) {
  m.def(
      "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, "
      "Tensor? key_lengths, Tensor? key_mask, Tensor? query_start, bool causal, "
      "int sliding_window, float scale, float dropout_p, Tensor? seed) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "prefix_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? prefix_k, "
      "Tensor? prefix_v, Tensor out, Tensor lse, Tensor? key_lengths, Tensor? key_mask, "
      "Tensor? query_start, bool causal, int sliding_window, float scale, float dropout_p, "
      "Tensor? seed, bool need_dq, bool need_dk, bool need_dv, bool need_dprefix_k, "
      "bool need_dprefix_v) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dprefix_k, Tensor dprefix_v)");
}

inline void check_heads(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape,
                        const Tensor& q) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == shape, "fused_peft: ", name,
                  " has the wrong shape; ops.prefix_attention says what is expected");
  STD_TORCH_CHECK(same_device(tensor, q), "fused_peft: ", name, " is not on q's device");
}

// Whether every row begins at a multiple of `alignment` bytes and is contiguous.
inline bool rows_fit(const Tensor& tensor, int64_t alignment) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.stride(last) != 1 && tensor.size(last) != 1) return false;
  for (int64_t d = 0; d < last; ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) * tensor.element_size() % alignment != 0)
      return false;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % static_cast<uintptr_t>(alignment) ==
         0;
}

// A tensor whose heads' rows are contiguous and aligned; a copy where they are not.
inline Tensor with_rows(const Tensor& tensor, int64_t alignment) {
  if (rows_fit(tensor, alignment)) return tensor;
  const Tensor rows = torch::stable::contiguous(tensor);
  return rows_fit(rows, alignment) ? rows : torch::stable::clone(rows);
}

inline HeadsView view_heads(const Tensor& t) {
  if (t.dim() == 3) return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)};
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline HeadsOut view_out(Tensor& t) {
  if (t.dim() == 3) return {t.mutable_data_ptr(), 0, t.stride(0), t.stride(1)};
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// [B, heads, length, D] in memory as [B, length, heads, D]: what the projection behind it reads.
inline Tensor new_heads(const Tensor& like, int64_t heads, int64_t length) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), length, heads, like.size(3)}), 1, 2);
}

// Options of both passes but the seed, as the schema has them.
struct Options {
  std::optional<Tensor> key_lengths, key_mask, query_start;
  bool causal;
  int64_t sliding_window;
  double scale, dropout_p;
};

// The operands of both passes, with copies of those that no kernel reads in place.
struct Operands {
  Tensor q, k, v;
  std::optional<Tensor> prefix_k, prefix_v, key_lengths, key_mask, query_start;
  PrefixAttentionParams params;
};

inline ScalarType lse_type(const PrefixAttentionParams& p) {
  return p.dtype == DType::kFloat32 ? ScalarType::Double : ScalarType::Float;
}

inline const int64_t* positions(const Tensor& t, const char* name, int64_t batch, const Tensor& q) {
  STD_TORCH_CHECK(same_device(t, q) && t.scalar_type() == ScalarType::Long &&
                      (t.numel() == 1 || (t.dim() == 1 && t.size(0) == batch)),
                  "fused_peft: ", name, " must be int64 [B] on q's device");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline void set_prefix(Operands& o, const Tensor& prefix_k, const Tensor& prefix_v,
                       int64_t alignment) {
  PrefixAttentionParams& p = o.params;
  STD_TORCH_CHECK(prefix_k.dim() == 3 || prefix_k.dim() == 4,
                  "fused_peft: prefix_k must be [Hkv, P, D] or [B, Hkv, P, D]");
  p.shared_prefix = prefix_k.dim() == 3;
  p.prefix = prefix_k.size(prefix_k.dim() - 2);
  std::vector<int64_t> shape{p.kv_heads, p.prefix, p.head_dim};
  if (!p.shared_prefix) shape.insert(shape.begin(), p.batch);
  check_heads(prefix_k, "prefix_k", shape, o.q);
  check_heads(prefix_v, "prefix_v", shape, o.q);
  STD_TORCH_CHECK(
      prefix_k.scalar_type() == o.q.scalar_type() && prefix_v.scalar_type() == o.q.scalar_type(),
      "fused_peft: prefix_k and prefix_v must have q's dtype");
  o.prefix_k = with_rows(prefix_k, alignment);
  o.prefix_v = with_rows(prefix_v, alignment);
  p.prefix_k = view_heads(*o.prefix_k);
  p.prefix_v = view_heads(*o.prefix_v);
}

inline void set_positions(Operands& o, const Options& options) {
  PrefixAttentionParams& p = o.params;
  if (options.key_lengths.has_value()) {
    o.key_lengths = torch::stable::contiguous(*options.key_lengths);
    STD_TORCH_CHECK(o.key_lengths->dim() == 1 && o.key_lengths->size(0) == p.batch,
                    "fused_peft: key_lengths must be int64 [B]");
    p.key_lengths = positions(*o.key_lengths, "key_lengths", p.batch, o.q);
  }
  if (options.query_start.has_value()) {
    o.query_start = torch::stable::contiguous(*options.query_start);
    p.query_start = positions(*o.query_start, "query_start", p.batch, o.q);
    p.query_start_stride = o.query_start->numel() == 1 ? 0 : 1;
  }
  if (options.key_mask.has_value()) {
    o.key_mask = with_rows(*options.key_mask, 1);
    STD_TORCH_CHECK(same_device(*o.key_mask, o.q) &&
                        o.key_mask->scalar_type() == ScalarType::Bool && o.key_mask->dim() == 2 &&
                        o.key_mask->size(0) == p.batch && o.key_mask->size(1) == p.keys,
                    "fused_peft: key_mask must be bool [B, T] on q's device");
    p.key_mask = static_cast<const uint8_t*>(o.key_mask->const_data_ptr());
    p.key_mask_stride = o.key_mask->stride(0);
  }
}

inline Operands gather(const Tensor& q, const Tensor& k, const Tensor& v,
                       const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v,
                       const Options& options, int64_t alignment) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4,
                  "fused_peft: q and k must be [B, heads, length, D]");
  Operands o{with_rows(q, alignment),
             with_rows(k, alignment),
             with_rows(v, alignment),
             {},
             {},
             {},
             {},
             {},
             {}};
  PrefixAttentionParams& p = o.params;
  p.batch = q.size(0);
  p.q_heads = q.size(1);
  p.queries = q.size(2);
  p.head_dim = q.size(3);
  p.kv_heads = k.size(1);
  p.keys = k.size(2);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.q_heads % p.kv_heads == 0,
                  "fused_peft: k's heads must divide q's");
  check_heads(k, "k", {p.batch, p.kv_heads, p.keys, p.head_dim}, q);
  check_heads(v, "v", {p.batch, p.kv_heads, p.keys, p.head_dim}, q);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "fused_peft: k and v must have q's dtype");
  p.dtype = dtype_of(q, "q");
  p.q = view_heads(o.q);
  p.k = view_heads(o.k);
  p.v = view_heads(o.v);
  STD_TORCH_CHECK(prefix_k.has_value() == prefix_v.has_value(),
                  "fused_peft: prefix_k and prefix_v come together");
  if (prefix_k.has_value()) set_prefix(o, *prefix_k, *prefix_v, alignment);
  set_positions(o, options);
  STD_TORCH_CHECK(options.dropout_p >= 0.0 && options.dropout_p < 1.0, "fused_peft: dropout_p is ",
                  options.dropout_p, "; expected 0 <= dropout_p < 1");
  p.causal = options.causal;
  p.window = options.sliding_window;
  p.scale = options.scale;
  p.dropout_p = options.dropout_p;
  return o;
}

struct Outputs {
  Tensor out, lse;
};

// out and lse of the forward pass, allocated; args.problem is set already.
inline Outputs allocate_outputs(PrefixAttentionForward& args, const Tensor& q) {
  const PrefixAttentionParams& p = args.problem;
  Outputs outputs{new_heads(q, p.q_heads, p.queries),
                  torch::stable::new_empty(q, {p.batch, p.q_heads, p.queries}, lse_type(p))};
  args.out = view_out(outputs.out);
  args.lse = outputs.lse.mutable_data_ptr();
  return outputs;
}

// Which gradients are wanted.
struct Needed {
  bool dq, dk, dv, dprefix_k, dprefix_v;
};

// A backward pass ready to launch: checked, its outputs allocated.
struct BackwardJob {
  PrefixAttentionBackward args;
  Tensor dout, out, lse;
  Tensor dq, dk, dv, dprefix_k, dprefix_v;
};

inline BackwardJob prepare_backward(const Operands& o, const Tensor& dout, const Tensor& out,
                                    const Tensor& lse, const Needed& needed, int64_t alignment) {
  const PrefixAttentionParams& p = o.params;
  const std::vector<int64_t> shape{p.batch, p.q_heads, p.queries, p.head_dim};
  check_heads(dout, "dout", shape, o.q);
  check_heads(out, "out", shape, o.q);
  STD_TORCH_CHECK(dout.scalar_type() == o.q.scalar_type() && out.scalar_type() == o.q.scalar_type(),
                  "fused_peft: dout and out must have q's dtype");
  STD_TORCH_CHECK(lse.numel() == p.batch * p.q_heads * p.queries && same_device(lse, o.q) &&
                      lse.scalar_type() == lse_type(p),
                  "fused_peft: lse must be the [B, Hq, S] of the forward pass");
  PrefixAttentionBackward args;
  args.problem = p;
  // What is not asked for is an empty tensor: a schema has no optional outputs.
  const auto keep = [](Tensor tensor, HeadsOut& view) {
    view = view_out(tensor);
    return tensor;
  };
  const auto heads = [&](bool wanted, int64_t count, int64_t length, HeadsOut& view) {
    return wanted ? keep(new_heads(o.q, count, length), view) : torch::stable::new_empty(o.q, {0});
  };
  const auto like = [&](bool wanted, const std::optional<Tensor>& prefix, HeadsOut& view) {
    if (!wanted || !prefix.has_value()) return torch::stable::new_empty(o.q, {0});
    const auto sizes = prefix->sizes();
    return keep(torch::stable::new_empty(o.q, std::vector<int64_t>(sizes.begin(), sizes.end())),
                view);
  };
  Tensor dq = heads(needed.dq, p.q_heads, p.queries, args.dq);
  Tensor dk = heads(needed.dk, p.kv_heads, p.keys, args.dk);
  Tensor dv = heads(needed.dv, p.kv_heads, p.keys, args.dv);
  Tensor dprefix_k = like(needed.dprefix_k, o.prefix_k, args.dprefix_k);
  Tensor dprefix_v = like(needed.dprefix_v, o.prefix_v, args.dprefix_v);
  BackwardJob job{args,
                  with_rows(dout, alignment),
                  with_rows(out, alignment),
                  torch::stable::contiguous(lse),
                  dq,
                  dk,
                  dv,
                  dprefix_k,
                  dprefix_v};
  job.args.dout = view_heads(job.dout);
  job.args.out = view_heads(job.out);
  job.args.lse = job.lse.const_data_ptr();
  return job;
}

}  // namespace fused_peft::attention
