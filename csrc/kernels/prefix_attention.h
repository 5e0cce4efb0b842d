// Attention over a learned prefix and the sequence's own keys: parameters and launchers. Plain
// structs, no framework, no exceptions.
//
//   scores = scale * q [prefix_k; k]^T              [B, Hq, S, P + T], masked
//   lse    = log sum exp(scores)                    [B, Hq, S]  float, double for float32
//   out    = drop(exp(scores - lse)) [prefix_v; v]  [B, Hq, S, D]
//
// Every query sees the whole prefix. Query i of row b stands at key p = query_start[b] + i and sees
// key t where t < key_lengths[b], key_mask[b, t], t <= p (causal), |p - t| < window. Query head h
// reads key head h / (Hq / Hkv). A query that sees no key gets zeros and lse = -inf.
//
// Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021; the pass over
// the keys and its gradients: Dao, "FlashAttention-2", 2023, algorithms 1 and 2.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace fused_peft {

// Element (b, h, i, d) lies at data + b * batch_stride + h * head_stride + i * row_stride + d
// elements.
struct HeadsView {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

struct HeadsOut {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

struct PrefixAttentionParams {
  int64_t batch = 0, q_heads = 0, kv_heads = 0;
  int64_t queries = 0, keys = 0, prefix = 0, head_dim = 0;
  DType dtype = DType::kFloat32;
  HeadsView q;                   // [B, Hq, S, D]
  HeadsView k, v;                // [B, Hkv, T, D]
  HeadsView prefix_k, prefix_v;  // [B, Hkv, P, D], or [Hkv, P, D] with batch_stride 0
  bool shared_prefix = true;     // the latter: its gradient is summed over the batch
  bool causal = false;
  int64_t window = 0;                    // 0: none
  const int64_t* key_lengths = nullptr;  // [B]
  const uint8_t* key_mask = nullptr;     // [B, T], rows key_mask_stride apart, 0 or 1
  int64_t key_mask_stride = 0;
  const int64_t* query_start = nullptr;  // rows query_start_stride apart; null: T - S
  int64_t query_start_stride = 0;
  double scale = 1.0;  // above 0
  double dropout_p = 0.0;
  uint64_t seed = 0;
};

struct PrefixAttentionForward {
  PrefixAttentionParams problem;
  HeadsOut out;  // [B, Hq, S, D]
  // [B, Hq, S] contiguous. float; double where dtype is kFloat32: weights are recomputed from it,
  // and a float of size 8 would lose a digit of each.
  void* lse = nullptr;
};

// A null output is not computed.
struct PrefixAttentionBackward {
  PrefixAttentionParams problem;
  HeadsView dout, out;            // [B, Hq, S, D]
  const void* lse = nullptr;      // of the forward pass
  HeadsOut dq;                    // [B, Hq, S, D]
  HeadsOut dk, dv;                // [B, Hkv, T, D]
  HeadsOut dprefix_k, dprefix_v;  // as prefix_k
};

namespace cpu {

constexpr int64_t kMaxHeadDim = 256;

Status prefix_attention_forward(const PrefixAttentionForward& args, Isa isa,
                                const ParallelFor& parallel);
Status prefix_attention_backward(const PrefixAttentionBackward& args, Isa isa,
                                 const ParallelFor& parallel);

}  // namespace cpu
}  // namespace fused_peft
