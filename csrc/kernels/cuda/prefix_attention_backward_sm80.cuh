// Prefix attention, backward (Dao, "FlashAttention-2", 2023, algorithm 2):
//
//   P  = 2^(scale_log2 q k^T - lse2)        dv = P^T dout
//   dS = P (dout v^T - delta)               dq = scale dS k,  dk = scale dS^T q
//
// delta = rowsum(dout out) by a pass of its own; dq by query tile; dk, dv by key tile, where a tile
// of a shared prefix is split over the batch, the group's heads and the queries, and the parts are
// added in a fixed order. No atomics: the same bits in every run.
#pragma once

#include "kernels/cuda/prefix_attention_tile_sm80.cuh"

namespace fused_peft::cuda {

struct AttentionBackwardParams {
  PrefixAttentionParams problem;
  HeadsView dout, out;
  const float* lse = nullptr;  // [B, Hq, S]
  HeadsOut dq, dk, dv, dprefix_k, dprefix_v;
  // [B, Hq, padded_queries]: lse in base 2 and delta. Rows beyond S, and those that see no key,
  // have lse2 = inf, so their weights are 0.
  float *lse2 = nullptr, *delta = nullptr;
  int32_t padded_queries = 0;  // S rounded up to kAttentionRows
  int32_t key_tiles = 0, prefix_tiles = 0, prefix_splits = 1;
  // [splits, Hkv, P, D] each, not yet scaled; null where there is one split.
  float *parts_k = nullptr, *parts_v = nullptr;
};

// A row of 16-byte chunks by kHead / 8 neighbouring lanes.
template <class Element, int kHead>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_delta_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int kLanes = HeadTile<kHead>::kCols / kChunk;
  using Traits = ElementTraits<Element>;
  const PrefixAttentionParams& problem = p.problem;
  const int64_t thread = int64_t{blockIdx.x} * kAttentionThreads + threadIdx.x;
  const int64_t row = thread / kLanes;
  const auto chunk = static_cast<int32_t>(thread % kLanes) * kChunk;
  const int64_t query = row % p.padded_queries, head_row = row / p.padded_queries;
  const int64_t head = head_row % problem.q_heads, b = head_row / problem.q_heads;
  const bool exists = b < problem.batch && query < problem.queries;
  float sum = 0.f;
  if (exists && chunk < problem.head_dim) {
    const uint4 a =
        __ldg(reinterpret_cast<const uint4*>(head_rows<Element>(p.dout, b, head, query) + chunk));
    const uint4 c =
        __ldg(reinterpret_cast<const uint4*>(head_rows<Element>(p.out, b, head, query) + chunk));
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = Traits::unpack(left[i]), y = Traits::unpack(right[i]);
      sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
    }
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (b >= problem.batch || chunk != 0) return;
  float lse2 = infinity();
  if (exists) {
    const float lse = p.lse[head_row * problem.queries + query];
    if (lse > -infinity()) lse2 = lse * kLog2e;
  }
  p.lse2[row] = lse2;
  p.delta[row] = sum;
}

// dprefix = scale * sum over splits of parts, in order. blockIdx.y: 0 for k, 1 for v.
template <class Element>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_reduce_kernel(const __grid_constant__ AttentionBackwardParams p) {
  const PrefixAttentionParams& problem = p.problem;
  const HeadsOut& out = blockIdx.y == 0 ? p.dprefix_k : p.dprefix_v;
  const float* parts = blockIdx.y == 0 ? p.parts_k : p.parts_v;
  const float scale = blockIdx.y == 0 ? static_cast<float>(problem.scale) : 1.f;
  const int64_t elements = problem.kv_heads * problem.prefix * problem.head_dim;
  const int64_t at = 2 * (int64_t{blockIdx.x} * kAttentionThreads + threadIdx.x);
  if (at >= elements || !out.data) return;
  float2 sum = {0.f, 0.f};
  for (int32_t split = 0; split < p.prefix_splits; ++split) {
    const auto part = *reinterpret_cast<const float2*>(parts + split * elements + at);
    sum.x += part.x;
    sum.y += part.y;
  }
  const int64_t d = at % problem.head_dim, row = at / problem.head_dim;
  Element* to = static_cast<Element*>(out.data) + row / problem.prefix * out.head_stride +
                row % problem.prefix * out.row_stride + d;
  *reinterpret_cast<uint32_t*>(to) = ElementTraits<Element>::pack(sum.x * scale, sum.y * scale);
}

}  // namespace fused_peft::cuda
