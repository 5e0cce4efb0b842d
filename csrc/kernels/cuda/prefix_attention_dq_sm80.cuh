// Prefix attention, backward: dq by query tile.
#pragma once

#include "kernels/cuda/prefix_attention_backward_sm80.cuh"

namespace fused_peft::cuda {

template <int kHead>
struct AttentionDq {
  using Tile = HeadTile<kHead>;
  static constexpr int kKeys = backward_block(kHead);
  static constexpr bool kInRegisters = kHead <= 128;
  static constexpr int kStages = kHead <= 128 ? 2 : 1;
  static constexpr int kRowsBytes = Tile::bytes(kAttentionRows), kTileBytes = Tile::bytes(kKeys);
  static constexpr int kSharedBytes = 2 * kRowsBytes + kStages * 2 * kTileBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

template <class Element, int kHead>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dq_kernel(const __grid_constant__ AttentionBackwardParams p) {
  using Kernel = AttentionDq<kHead>;
  using Tile = typename Kernel::Tile;
  constexpr int kKeys = Kernel::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PrefixAttentionParams& problem = p.problem;
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
  const auto queries = static_cast<int32_t>(problem.queries);
  const int32_t query_tiles = p.padded_queries / kAttentionRows;
  int64_t block = blockIdx.x;
  int32_t tile_index = static_cast<int32_t>(block % query_tiles);
  if (problem.causal) tile_index = query_tiles - 1 - tile_index;
  block /= query_tiles;
  const auto head = static_cast<int32_t>(block % problem.q_heads);
  const auto b = static_cast<int32_t>(block / problem.q_heads);
  const auto kv_head = static_cast<int32_t>(head / (problem.q_heads / problem.kv_heads));
  const int32_t q0 = tile_index * kAttentionRows;
  const int32_t q1 = q0 + kAttentionRows < queries ? q0 + kAttentionRows : queries;

  const BatchRow batch(problem, b);
  KeyTiles<Element, Tile, kKeys> tiles(problem.prefix, keys_seen(batch, {q0, q1}).some);

  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t dout_tile = q_tile + Kernel::kRowsBytes;
  const uint32_t ring = dout_tile + Kernel::kRowsBytes;
  const auto slot_of = [&](int32_t tile) {
    return ring + (Kernel::kStages == 2 ? tile & 1 : 0) * 2 * Kernel::kTileBytes;
  };
  const auto fill = [&](int32_t tile) {
    if (tile == 0 || tile == tiles.prefix_tiles) tiles.seek(problem, b, kv_head, tile);
    tiles.fill_next(problem, tile, slot_of(tile), slot_of(tile) + Kernel::kTileBytes);
    ptx::cp_async_commit();
  };
  fill_rows<Element, Tile, kAttentionRows>(q_tile, head_rows<Element>(problem.q, b, head, q0),
                                           problem.q.row_stride, q1 - q0, head_dim);
  fill_rows<Element, Tile, kAttentionRows>(dout_tile, head_rows<Element>(p.dout, b, head, q0),
                                           p.dout.row_stride, q1 - q0, head_dim);
  if (tiles.count > 0)
    fill(0);
  else
    ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  const LaneOffsets<Tile> offsets(lane);
  LeftRows<Tile, Kernel::kInRegisters> q, dout;
  q.load(q_tile + Tile::bytes(16 * warp), offsets);
  dout.load(dout_tile + Tile::bytes(16 * warp), offsets);
  const int32_t warp_q0 = q0 + warp * 16, upper = warp_q0 + lane / 4;
  const int32_t warp_q1 = warp_q0 + 16 < queries ? warp_q0 + 16 : queries;
  const Visible keys = keys_seen(batch, {warp_q0, warp_q1});
  const int64_t stats = (int64_t{b} * problem.q_heads + head) * p.padded_queries + upper;
  const float lse2[2] = {p.lse2[stats], p.lse2[stats + 8]};
  const float delta[2] = {p.delta[stats], p.delta[stats + 8]};
  const auto scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);

  float dq[kHead / 8][4] = {};
#pragma unroll 1
  for (int32_t tile = 0; tile < tiles.count; ++tile) {
    if (tile > 0) {
      if (Kernel::kStages == 1) {
        __syncthreads();
        fill(tile);
      }
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    if (Kernel::kStages == 2 && tile + 1 < tiles.count) fill(tile + 1);
    const int32_t key0 = tiles.key(tile);
    const bool prefix = tiles.in_prefix(tile);
    if (warp_q0 >= queries || (!prefix && keys.none(key0, key0 + kKeys))) continue;
    const bool whole = prefix ? key0 + kKeys <= tiles.prefix : keys.whole(key0, key0 + kKeys);
    const uint32_t k_tile = slot_of(tile), v_tile = k_tile + Kernel::kTileBytes;
    float weights[kKeys / 8][4] = {}, dweights[kKeys / 8][4] = {};
    multiply_rows<Element, Tile, kKeys>(weights, q, k_tile, offsets);
    multiply_rows<Element, Tile, kKeys>(dweights, dout, v_tile, offsets);
    Range seen[2] = {{0, key0 + kKeys}, {0, key0 + kKeys}};
    const uint8_t* mask = nullptr;
    if (!whole) {
      if (!prefix) mask = BatchRow(problem, b).mask;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        seen[half] =
            prefix ? Range{0, tiles.prefix} : BatchRow(problem, b).keys_of_query(upper + 8 * half);
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = ptx::exp2_approx(fmaf(weights[j][i], scale_log2, -lse2[i / 2]));
        if (!whole) {
          const int32_t key = key0 + j * 8 + lane % 4 * 2 + i % 2;
          const Range& range = seen[i / 2];
          if (key < range.lo || key >= range.hi || (mask && !mask[key])) weight = 0.f;
        }
        weights[j][i] = weight * (dweights[j][i] - delta[i / 2]);
      }
    multiply_weights<Element, Tile, kKeys>(dq, weights, k_tile, offsets);
  }

  const auto scale = static_cast<float>(problem.scale);
  unsigned char* const mine = shared + Tile::bytes(16 * warp);
  round_rows<Element, Tile>(mine, dq, scale, scale, lane);
  store_rows<Element, Tile>(mine, head_dim, lane, [&](int row) -> Element* {
    const int32_t query = q0 + warp * 16 + row;
    if (query >= queries) return nullptr;
    return static_cast<Element*>(p.dq.data) + b * p.dq.batch_stride + head * p.dq.head_stride +
           query * p.dq.row_stride;
  });
}

}  // namespace fused_peft::cuda
