// Which kernels and tiles a prefix attention problem gets on a device: a pure function of the
// problem and the device, testable without either.
#pragma once

#include "kernels/cuda/device.h"

namespace fused_peft::cuda {

struct PrefixAttentionShape {
  int64_t batch = 0, q_heads = 0, kv_heads = 0;
  int64_t queries = 0, keys = 0, prefix = 0, head_dim = 0;
  bool shared_prefix = true;
};

constexpr int64_t kAttentionMaxHeadDim = 256;
constexpr int kAttentionRows = 64;  // queries of a CTA, or keys in the dk/dv kernel: 4 warps by 16

// Columns that are compiled: the head dimension rounded up, the rest of a row being zeros.
constexpr int32_t head_tile(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}
// Keys of a tile of the forward pass: two stages of K and V, and Q, within 99 KiB.
constexpr int32_t forward_block_keys(int32_t head) { return head <= 128 ? 64 : 32; }
// Keys of a tile of the dq kernel and queries of one of the dk/dv kernel. Wide heads leave
// registers for 32 columns of scores and of their gradients.
constexpr int32_t backward_block(int32_t head) { return head <= 64 ? 64 : 32; }

// Up to here a query tile is mostly padding: the query heads of a group share one, and the keys are
// split over CTAs.
constexpr int64_t kAttentionDecodeMaxQueries = 16;
constexpr int64_t kAttentionMaxSplits = 64;

struct PrefixAttentionPlan {
  int32_t head = 0, block_keys = 0, block_backward = 0;
  bool decode = false;
  int32_t key_splits = 1;   // of decode
  int64_t query_tiles = 0;  // per head, or per key head in decode
  int64_t forward_ctas = 0;
  int32_t forward_launches = 0;
  int64_t key_tiles = 0, prefix_tiles = 0;  // of the dk/dv kernel, per key head
  int32_t prefix_splits = 1;                // partial sums of a shared prefix's gradient
  int64_t dq_ctas = 0, dkv_ctas = 0;
};

// Splits of `items` of work so that `ctas` CTAs times the splits fill the SMs twice.
constexpr int32_t fill_device(int64_t ctas, int64_t items, const DeviceFacts& device) {
  if (ctas <= 0 || items <= 1) return 1;
  int64_t splits = ceil_div(2 * int64_t{device.num_sms}, ctas);
  if (splits > items) splits = items;
  return static_cast<int32_t>(splits > kAttentionMaxSplits ? kAttentionMaxSplits : splits);
}

constexpr PrefixAttentionPlan plan_prefix_attention(const PrefixAttentionShape& p,
                                                    const DeviceFacts& device) {
  PrefixAttentionPlan plan;
  plan.head = head_tile(p.head_dim);
  plan.block_keys = forward_block_keys(plan.head);
  plan.block_backward = backward_block(plan.head);
  plan.decode = p.queries <= kAttentionDecodeMaxQueries;
  const int64_t group = p.kv_heads > 0 ? p.q_heads / p.kv_heads : 0;
  const int64_t rows = plan.decode ? group * p.queries : p.queries;
  plan.query_tiles = ceil_div(rows, kAttentionRows);
  plan.forward_ctas = p.batch * (plan.decode ? p.kv_heads : p.q_heads) * plan.query_tiles;
  if (plan.decode) {
    const int64_t tiles = ceil_div(p.prefix, plan.block_keys) + ceil_div(p.keys, plan.block_keys);
    plan.key_splits = fill_device(plan.forward_ctas, tiles, device);
    plan.forward_ctas *= plan.key_splits;
  }
  plan.forward_launches = plan.key_splits > 1 ? 2 : 1;
  plan.key_tiles = ceil_div(p.keys, kAttentionRows);
  plan.prefix_tiles = ceil_div(p.prefix, kAttentionRows);
  plan.dq_ctas = p.batch * p.q_heads * ceil_div(p.queries, kAttentionRows);
  const int64_t prefix_ctas = p.kv_heads * plan.prefix_tiles;
  if (p.shared_prefix)
    plan.prefix_splits = fill_device(
        prefix_ctas, p.batch * group * ceil_div(p.queries, plan.block_backward), device);
  plan.dkv_ctas = p.batch * p.kv_heads * plan.key_tiles +
                  prefix_ctas * (p.shared_prefix ? plan.prefix_splits : p.batch);
  return plan;
}

}  // namespace fused_peft::cuda
