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
constexpr int kAttentionWideRows = 128;  // queries of a CTA with twice the rows a warp

// Columns that are compiled: the head dimension rounded up, the rest of a row being zeros.
constexpr int32_t head_tile(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}
// A wide query tile reads K and V once for twice the queries, and each of their fragments feeds two
// products. Of 256 columns there are no registers for it.
constexpr bool has_wide_rows(int32_t head) { return head <= 128; }
// Keys of a tile of the forward pass: two stages of K and V, and Q, within 99 KiB, and the scores
// beside the output in registers.
constexpr int32_t forward_block_keys(int32_t head, int32_t rows) {
  return head <= 64 || (head <= 128 && rows <= kAttentionRows) ? 64 : 32;
}
// Keys of a tile of the dq kernel and queries of one of the dk/dv kernel. Wide heads leave
// registers for 32 columns of scores and of their gradients.
constexpr int32_t backward_block(int32_t head) { return head <= 64 ? 64 : 32; }
// Wide heads leave registers for one of dk and dv: two launches, which recompute the scores.
constexpr bool dkv_in_two_launches(int32_t head) { return head > 128; }

// Up to here a query tile is mostly padding: the query heads of a group share one, and the keys are
// split over CTAs.
constexpr int64_t kAttentionDecodeMaxQueries = 16;
constexpr int64_t kAttentionMaxSplits = 64;

struct PrefixAttentionPlan {
  int32_t head = 0, query_rows = 0, block_keys = 0, block_backward = 0;
  bool decode = false, cascade = false;
  int64_t query_tiles = 0;                     // per head, or per key head in decode
  int64_t cascade_tiles = 0;                   // per key head, of the queries of all batch rows
  int32_t key_splits = 1, cascade_splits = 0;  // of decode
  int64_t forward_ctas = 0;
  int32_t forward_launches = 0;
  int64_t key_tiles = 0, prefix_tiles = 0;  // of the dk/dv kernel, per key head
  int32_t prefix_splits = 1;                // partial sums of a shared prefix's gradient
  int64_t dq_ctas = 0, dkv_ctas = 0;
  int32_t backward_launches = 0;  // where all gradients are wanted
};

// Splits of `items` of work so that `ctas` CTAs times the splits fill the SMs twice.
constexpr int32_t fill_device(int64_t ctas, int64_t items, const DeviceFacts& device) {
  if (ctas <= 0 || items <= 1) return 1;
  int64_t splits = ceil_div(2 * int64_t{device.num_sms}, ctas);
  if (splits > items) splits = items;
  if (splits > kAttentionMaxSplits) splits = kAttentionMaxSplits;
  return splits < 1 ? 1 : static_cast<int32_t>(splits);
}

// Whether the queries of all batch rows read a shared prefix together (the cascade of Ye et al.,
// "FlashInfer", 2024): the bytes of K and V that this saves against those of the partial results it
// writes and reads, two more parts of each row's float output.
constexpr bool cascade_pays(const PrefixAttentionShape& p, int64_t rows) {
  if (!p.shared_prefix || p.prefix == 0 || rows == 0) return false;
  const int64_t readers = p.batch * ceil_div(rows, kAttentionRows);
  const int64_t tiles = ceil_div(p.batch * rows, kAttentionRows);
  const int64_t saved = (readers - tiles) * p.prefix * 2 * 2;  // K and V of 2 bytes
  const int64_t added = 2 * p.batch * rows * 2 * 4;            // written and read, of 4 bytes
  return saved > added;
}

constexpr void plan_decode(PrefixAttentionPlan& plan, const PrefixAttentionShape& p, int64_t rows,
                           const DeviceFacts& device) {
  const int64_t prefix = ceil_div(p.prefix, plan.block_keys);
  const int64_t keys = ceil_div(p.keys, plan.block_keys);
  plan.cascade = cascade_pays(p, rows);
  plan.key_splits = fill_device(plan.forward_ctas, plan.cascade ? keys : prefix + keys, device);
  plan.forward_ctas *= plan.key_splits;
  if (plan.cascade) {
    plan.cascade_tiles = ceil_div(p.batch * rows, kAttentionRows);
    // About as many tiles for a CTA of the prefix as for one of the sequence.
    const int64_t share = ceil_div(keys, plan.key_splits);
    plan.cascade_splits = fill_device(p.kv_heads * plan.cascade_tiles,
                                      ceil_div(prefix, share > 1 ? share : 1), device);
    plan.forward_ctas += p.kv_heads * plan.cascade_tiles * plan.cascade_splits;
  }
}

constexpr PrefixAttentionPlan plan_prefix_attention(const PrefixAttentionShape& p,
                                                    const DeviceFacts& device) {
  PrefixAttentionPlan plan;
  plan.head = head_tile(p.head_dim);
  plan.block_backward = backward_block(plan.head);
  plan.decode = p.queries <= kAttentionDecodeMaxQueries;
  const int64_t group = p.kv_heads > 0 ? p.q_heads / p.kv_heads : 0;
  const int64_t rows = plan.decode ? group * p.queries : p.queries;
  const int64_t heads = p.batch * (plan.decode ? p.kv_heads : p.q_heads);
  // Twice as many as there are SMs: one CTA of four warps does not keep a tensor core busy.
  const bool wide = !plan.decode && has_wide_rows(plan.head) &&
                    heads * ceil_div(rows, kAttentionWideRows) >= 2 * int64_t{device.num_sms};
  plan.query_rows = wide ? kAttentionWideRows : kAttentionRows;
  plan.block_keys = forward_block_keys(plan.head, plan.query_rows);
  plan.query_tiles = ceil_div(rows, plan.query_rows);
  plan.forward_ctas = heads * plan.query_tiles;
  if (plan.decode) plan_decode(plan, p, rows, device);
  plan.forward_launches = plan.forward_ctas == 0                       ? 0
                          : plan.key_splits + plan.cascade_splits == 1 ? 1
                                                                       : 2;
  plan.key_tiles = ceil_div(p.keys, kAttentionRows);
  plan.prefix_tiles = ceil_div(p.prefix, kAttentionRows);
  plan.dq_ctas = p.batch * p.q_heads * ceil_div(p.queries, kAttentionRows);
  const int64_t prefix_ctas = p.kv_heads * plan.prefix_tiles;
  if (p.shared_prefix)
    plan.prefix_splits = fill_device(
        prefix_ctas, p.batch * group * ceil_div(p.queries, plan.block_backward), device);
  plan.dkv_ctas = p.batch * p.kv_heads * plan.key_tiles +
                  prefix_ctas * (p.shared_prefix ? plan.prefix_splits : p.batch);
  plan.backward_launches = (plan.dq_ctas > 0 ? 2 : 0) + (plan.prefix_splits > 1 ? 1 : 0) +
                           (plan.dkv_ctas == 0               ? 0
                            : dkv_in_two_launches(plan.head) ? 2
                                                             : 1);
  return plan;
}

}  // namespace fused_peft::cuda
