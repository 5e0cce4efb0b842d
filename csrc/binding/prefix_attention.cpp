// Ops fused_peft::prefix_attention and fused_peft::prefix_attention_backward for the CPU: tensors
// to params, checks, launch. Written against torch's stable ABI.
#include "kernels/prefix_attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "binding/cpu_isa.h"
#include "binding/tensors.h"

namespace fused_peft {
namespace {

void check_heads(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == shape, "fused_peft: ", name,
                  " has the wrong shape; ops.prefix_attention says what is expected");
  STD_TORCH_CHECK(tensor.is_cpu(), "fused_peft: ", name, " is not on the CPU, where q is");
}

// A tensor whose heads' rows are contiguous; a copy where they are not.
Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

HeadsView view_heads(const Tensor& t) {
  if (t.dim() == 3) return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)};
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

HeadsOut view_out(Tensor& t) {
  if (t.dim() == 3) return {t.mutable_data_ptr(), 0, t.stride(0), t.stride(1)};
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// [B, heads, length, D] in memory as [B, length, heads, D]: what the projection behind it reads.
Tensor new_heads(const Tensor& like, int64_t heads, int64_t length) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), length, heads, like.size(3)}), 1, 2);
}

// Options of both passes, as the schema has them.
struct Options {
  std::optional<Tensor> key_lengths, key_mask, query_start;
  bool causal;
  int64_t sliding_window;
  double scale, dropout_p;
  std::optional<Tensor> seed;
};

// The operands of both passes, with copies of those that no kernel reads in place.
struct Operands {
  Tensor q, k, v;
  std::optional<Tensor> prefix_k, prefix_v, key_lengths, key_mask, query_start;
  PrefixAttentionParams params;
};

ScalarType lse_type(const PrefixAttentionParams& p) {
  return p.dtype == DType::kFloat32 ? ScalarType::Double : ScalarType::Float;
}

const int64_t* positions(const Tensor& t, const char* name, int64_t batch) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long &&
                      (t.numel() == 1 || (t.dim() == 1 && t.size(0) == batch)),
                  "fused_peft: ", name, " must be int64 [B] on the CPU");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

void set_prefix(Operands& o, const Tensor& prefix_k, const Tensor& prefix_v) {
  PrefixAttentionParams& p = o.params;
  STD_TORCH_CHECK(prefix_k.dim() == 3 || prefix_k.dim() == 4,
                  "fused_peft: prefix_k must be [Hkv, P, D] or [B, Hkv, P, D]");
  p.shared_prefix = prefix_k.dim() == 3;
  p.prefix = prefix_k.size(prefix_k.dim() - 2);
  std::vector<int64_t> shape{p.kv_heads, p.prefix, p.head_dim};
  if (!p.shared_prefix) shape.insert(shape.begin(), p.batch);
  check_heads(prefix_k, "prefix_k", shape);
  check_heads(prefix_v, "prefix_v", shape);
  STD_TORCH_CHECK(
      prefix_k.scalar_type() == o.q.scalar_type() && prefix_v.scalar_type() == o.q.scalar_type(),
      "fused_peft: prefix_k and prefix_v must have q's dtype");
  o.prefix_k = with_contiguous_rows(prefix_k);
  o.prefix_v = with_contiguous_rows(prefix_v);
  p.prefix_k = view_heads(*o.prefix_k);
  p.prefix_v = view_heads(*o.prefix_v);
}

void set_positions(Operands& o, const Options& options) {
  PrefixAttentionParams& p = o.params;
  if (options.key_lengths.has_value()) {
    o.key_lengths = torch::stable::contiguous(*options.key_lengths);
    STD_TORCH_CHECK(o.key_lengths->dim() == 1 && o.key_lengths->size(0) == p.batch,
                    "fused_peft: key_lengths must be int64 [B]");
    p.key_lengths = positions(*o.key_lengths, "key_lengths", p.batch);
  }
  if (options.query_start.has_value()) {
    o.query_start = torch::stable::contiguous(*options.query_start);
    p.query_start = positions(*o.query_start, "query_start", p.batch);
    p.query_start_stride = o.query_start->numel() == 1 ? 0 : 1;
  }
  if (options.key_mask.has_value()) {
    o.key_mask = with_contiguous_rows(*options.key_mask);
    STD_TORCH_CHECK(o.key_mask->is_cpu() && o.key_mask->scalar_type() == ScalarType::Bool &&
                        o.key_mask->dim() == 2 && o.key_mask->size(0) == p.batch &&
                        o.key_mask->size(1) == p.keys,
                    "fused_peft: key_mask must be bool [B, T] on the CPU");
    p.key_mask = static_cast<const uint8_t*>(o.key_mask->const_data_ptr());
    p.key_mask_stride = o.key_mask->stride(0);
  }
}

Operands gather(const Tensor& q, const Tensor& k, const Tensor& v,
                const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v,
                const Options& options) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.is_cpu(),
                  "fused_peft: q and k must be [B, heads, length, D] on the CPU");
  Operands o{with_contiguous_rows(q),
             with_contiguous_rows(k),
             with_contiguous_rows(v),
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
  check_heads(k, "k", {p.batch, p.kv_heads, p.keys, p.head_dim});
  check_heads(v, "v", {p.batch, p.kv_heads, p.keys, p.head_dim});
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "fused_peft: k and v must have q's dtype");
  p.dtype = dtype_of(q, "q");
  p.q = view_heads(o.q);
  p.k = view_heads(o.k);
  p.v = view_heads(o.v);
  STD_TORCH_CHECK(prefix_k.has_value() == prefix_v.has_value(),
                  "fused_peft: prefix_k and prefix_v come together");
  if (prefix_k.has_value()) set_prefix(o, *prefix_k, *prefix_v);
  set_positions(o, options);
  STD_TORCH_CHECK(options.dropout_p >= 0.0 && options.dropout_p < 1.0, "fused_peft: dropout_p is ",
                  options.dropout_p, "; expected 0 <= dropout_p < 1");
  p.causal = options.causal;
  p.window = options.sliding_window;
  p.scale = options.scale;
  p.dropout_p = options.dropout_p;
  p.seed = seed_of(options.seed, options.dropout_p);
  return o;
}

std::tuple<Tensor, Tensor> prefix_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> prefix_k,
    std::optional<Tensor> prefix_v, std::optional<Tensor> key_lengths,
    std::optional<Tensor> key_mask, std::optional<Tensor> query_start, bool causal,
    int64_t sliding_window, double scale, double dropout_p, std::optional<Tensor> seed) {
  const Operands o =
      gather(q, k, v, prefix_k, prefix_v,
             {key_lengths, key_mask, query_start, causal, sliding_window, scale, dropout_p, seed});
  const PrefixAttentionParams& p = o.params;
  Tensor out = new_heads(q, p.q_heads, p.queries);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.q_heads, p.queries}, lse_type(p));
  PrefixAttentionForward args;
  args.problem = p;
  args.out = view_out(out);
  args.lse = lse.mutable_data_ptr();
  check_status(cpu::prefix_attention_forward(args, cpu::chosen_isa(), torch_threads()),
               "prefix_attention");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
    std::optional<Tensor> prefix_k, std::optional<Tensor> prefix_v, const Tensor& out,
    const Tensor& lse, std::optional<Tensor> key_lengths, std::optional<Tensor> key_mask,
    std::optional<Tensor> query_start, bool causal, int64_t sliding_window, double scale,
    double dropout_p, std::optional<Tensor> seed, bool need_dq, bool need_dk, bool need_dv,
    bool need_dprefix_k, bool need_dprefix_v) {
  const Operands o =
      gather(q, k, v, prefix_k, prefix_v,
             {key_lengths, key_mask, query_start, causal, sliding_window, scale, dropout_p, seed});
  const PrefixAttentionParams& p = o.params;
  const std::vector<int64_t> shape{p.batch, p.q_heads, p.queries, p.head_dim};
  check_heads(dout, "dout", shape);
  check_heads(out, "out", shape);
  STD_TORCH_CHECK(dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type(),
                  "fused_peft: dout and out must have q's dtype");
  STD_TORCH_CHECK(lse.numel() == p.batch * p.q_heads * p.queries && lse.is_cpu() &&
                      lse.scalar_type() == lse_type(p),
                  "fused_peft: lse must be the [B, Hq, S] of the forward pass");
  const Tensor dout_rows = with_contiguous_rows(dout), out_rows = with_contiguous_rows(out);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  PrefixAttentionBackward args;
  args.problem = p;
  args.dout = view_heads(dout_rows);
  args.out = view_heads(out_rows);
  args.lse = lse_rows.const_data_ptr();
  // What is not asked for is an empty tensor: a schema has no optional outputs.
  const auto keep = [](Tensor tensor, HeadsOut& view) {
    view = view_out(tensor);
    return tensor;
  };
  const auto heads = [&](bool needed, int64_t count, int64_t length, HeadsOut& view) {
    return needed ? keep(new_heads(q, count, length), view) : torch::stable::new_empty(q, {0});
  };
  const auto like = [&](bool needed, const std::optional<Tensor>& prefix, HeadsOut& view) {
    if (!needed || !prefix.has_value()) return torch::stable::new_empty(q, {0});
    const auto sizes = prefix->sizes();
    return keep(torch::stable::new_empty(q, std::vector<int64_t>(sizes.begin(), sizes.end())),
                view);
  };
  Tensor dq = heads(need_dq, p.q_heads, p.queries, args.dq);
  Tensor dk = heads(need_dk, p.kv_heads, p.keys, args.dk);
  Tensor dv = heads(need_dv, p.kv_heads, p.keys, args.dv);
  Tensor dprefix_k = like(need_dprefix_k, prefix_k, args.dprefix_k);
  Tensor dprefix_v = like(need_dprefix_v, prefix_v, args.dprefix_v);
  check_status(cpu::prefix_attention_backward(args, cpu::chosen_isa(), torch_threads()),
               "prefix_attention_backward");
  return {dq, dk, dv, dprefix_k, dprefix_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_peft, m) {
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

STABLE_TORCH_LIBRARY_IMPL(fused_peft, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}

}  // namespace fused_peft
