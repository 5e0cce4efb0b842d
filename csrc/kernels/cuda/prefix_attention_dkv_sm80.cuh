// Prefix attention, backward: dk and dv by key tile, of the sequence and of the prefix. A tile of a
// shared prefix is split over the batch rows, the group's heads and the queries.
#pragma once

#include "kernels/cuda/prefix_attention_backward_sm80.cuh"

namespace fused_peft::cuda {

// Wide heads leave registers for one of dk and dv: two launches, which recompute the scores.
template <int kHead>
struct AttentionDkv {
  using Tile = HeadTile<kHead>;
  static constexpr int kQueries = backward_block(kHead);
  static constexpr int kStages = kHead <= 128 ? 2 : 1;
  static constexpr int kRowsBytes = Tile::bytes(kAttentionRows), kTileBytes = Tile::bytes(kQueries);
  static constexpr int kStageBytes = 2 * kTileBytes + 2 * kQueries * 4;  // q, dout, lse2, delta
  static constexpr int kSharedBytes = 2 * kRowsBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

// A CTA's key tile, of batch row `row`, and its share of the (batch row, query head, query tile)
// items that see it, in that order.
struct KeyTileWork {
  bool prefix = false;
  int32_t row = 0, kv_head = 0, key0 = 0, split = 0;
  int32_t first_tile = 0, end_tile = 0;  // query tiles of an item's head
  int32_t b = 0, head = 0, tile = 0;     // of the next item
  int32_t items = 0;

  __device__ KeyTileWork(const AttentionBackwardParams& p, int32_t block_queries) {
    const PrefixAttentionParams& problem = p.problem;
    uint32_t block = blockIdx.x;
    const auto heads = static_cast<uint32_t>(problem.kv_heads);
    const bool shared_prefix = problem.shared_prefix;
    const uint32_t prefix_ctas =
        heads * p.prefix_tiles *
        (shared_prefix ? p.prefix_splits : static_cast<int32_t>(problem.batch));
    prefix = block < prefix_ctas;
    if (!prefix) block -= prefix_ctas;
    const auto key_tiles = static_cast<uint32_t>(prefix ? p.prefix_tiles : p.key_tiles);
    key0 = static_cast<int32_t>(block % key_tiles) * kAttentionRows;
    block /= key_tiles;
    kv_head = static_cast<int32_t>(block % heads);
    const auto outer = static_cast<int32_t>(block / heads);
    const bool whole_batch = prefix && shared_prefix;
    row = b = whole_batch ? 0 : outer;
    split = whole_batch ? outer : 0;
    Range seen = {0, static_cast<int32_t>(problem.queries)};
    if (!prefix) seen = queries_seeing(BatchRow(problem, row), {key0, key0 + kAttentionRows}).some;
    first_tile = seen.lo / block_queries;
    end_tile = seen.hi > seen.lo ? (seen.hi - 1) / block_queries + 1 : first_tile;
    take_share(problem, whole_batch ? p.prefix_splits : 1, whole_batch);
  }

  __device__ void next(int32_t group) {
    if (++tile < end_tile) return;
    tile = first_tile;
    if (++head < (kv_head + 1) * group) return;
    head = kv_head * group;
    ++b;
  }

 private:
  __device__ void take_share(const PrefixAttentionParams& problem, int32_t splits,
                             bool whole_batch) {
    const auto group = static_cast<int32_t>(problem.q_heads / problem.kv_heads);
    const int32_t tiles = end_tile - first_tile;
    const int64_t all =
        int64_t{tiles} * group * (whole_batch ? static_cast<int32_t>(problem.batch) : 1);
    const auto begin = static_cast<int32_t>(all * split / splits);
    items = static_cast<int32_t>(all * (split + 1) / splits) - begin;
    if (items == 0) return;
    const int32_t unit = begin / tiles;
    tile = first_tile + begin % tiles;
    head = kv_head * group + unit % group;
    b += unit / group;
  }
};

template <class Element, class Tile>
__device__ inline void store_key_rows(unsigned char* tile, const float (*acc)[4], float scale,
                                      const HeadsOut& out, float* parts, const KeyTileWork& work,
                                      const PrefixAttentionParams& problem, int warp, int lane) {
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
  const auto count = static_cast<int32_t>(work.prefix ? problem.prefix : problem.keys);
  const int32_t key0 = work.key0 + warp * 16;
  if (key0 >= count) return;
  if (work.prefix && parts) {
    float* const rows =
        parts + (int64_t{work.split} * problem.kv_heads + work.kv_head) * count * head_dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t key = key0 + lane / 4 + 8 * half;
      if (key >= count) continue;
#pragma unroll
      for (int j = 0; j < Tile::kHead / 8; ++j)
        if (j * 8 < head_dim)
          ptx::store_global_v2(rows + int64_t{key} * head_dim + j * 8 + lane % 4 * 2,
                               acc[j][2 * half], acc[j][2 * half + 1]);
    }
    return;
  }
  round_rows<Element, Tile>(tile, acc, scale, scale, lane);
  store_rows<Element, Tile>(tile, head_dim, lane, [&](int row) -> Element* {
    if (key0 + row >= count) return nullptr;
    return static_cast<Element*>(out.data) + work.row * out.batch_stride +
           work.kv_head * out.head_stride + (key0 + row) * out.row_stride;
  });
}

template <class Element, int kHead, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dkv_kernel(const __grid_constant__ AttentionBackwardParams p) {
  using Kernel = AttentionDkv<kHead>;
  using Tile = typename Kernel::Tile;
  constexpr int kQueries = Kernel::kQueries;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PrefixAttentionParams& problem = p.problem;
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
  const auto queries = static_cast<int32_t>(problem.queries);
  const auto group = static_cast<int32_t>(problem.q_heads / problem.kv_heads);
  KeyTileWork work(p, kQueries);

  const uint32_t k_tile = ptx::shared_address(shared);
  const uint32_t v_tile = k_tile + Kernel::kRowsBytes;
  const uint32_t ring = v_tile + Kernel::kRowsBytes;
  const auto slot_of = [](int32_t item) { return item % Kernel::kStages * Kernel::kStageBytes; };
  // Returns the item's first query.
  const auto fill = [&](int32_t item) {
    const int32_t query0 = work.tile * kQueries, valid = queries - query0;
    const uint32_t slot = ring + slot_of(item);
    fill_rows<Element, Tile, kQueries>(slot,
                                       head_rows<Element>(problem.q, work.b, work.head, query0),
                                       problem.q.row_stride, valid, head_dim);
    fill_rows<Element, Tile, kQueries>(slot + Kernel::kTileBytes,
                                       head_rows<Element>(p.dout, work.b, work.head, query0),
                                       p.dout.row_stride, valid, head_dim);
    constexpr int kChunks = kQueries / 4;  // 16 bytes of floats
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < 2 * kChunks) {
      const float* from = thread < kChunks ? p.lse2 : p.delta;
      const int64_t row = work.b * problem.q_heads + work.head;
      ptx::cp_async_16(slot + 2 * Kernel::kTileBytes + thread * 16,
                       from + row * p.padded_queries + query0 + thread % kChunks * 4, true);
    }
    ptx::cp_async_commit();
    work.next(group);
    return query0;
  };

  const HeadsView& k = work.prefix ? problem.prefix_k : problem.k;
  const HeadsView& v = work.prefix ? problem.prefix_v : problem.v;
  const auto count = static_cast<int32_t>(work.prefix ? problem.prefix : problem.keys);
  fill_rows<Element, Tile, kAttentionRows>(k_tile,
                                           head_rows<Element>(k, work.row, work.kv_head, work.key0),
                                           k.row_stride, count - work.key0, head_dim);
  if (kWantK)
    fill_rows<Element, Tile, kAttentionRows>(
        v_tile, head_rows<Element>(v, work.row, work.kv_head, work.key0), v.row_stride,
        count - work.key0, head_dim);
  int32_t next_query0 = 0;
  if (work.items > 0)
    next_query0 = fill(0);
  else
    ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  const LaneOffsets<Tile> offsets(lane);
  LeftRows<Tile, false> k_rows, v_rows;
  k_rows.load(k_tile + Tile::bytes(16 * warp), offsets);
  v_rows.load(v_tile + Tile::bytes(16 * warp), offsets);
  const auto scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);

  // The queries that see this lane's two keys, and the warp's.
  const int32_t warp_key0 = work.key0 + warp * 16;
  Range seen[2] = {{0, queries}, {0, queries}};
  Visible visible;
  if (work.prefix) {
    if (warp_key0 < count) visible = {seen[0], seen[0]};
  } else {
    const BatchRow batch(problem, work.row);
    visible = queries_seeing(batch, {warp_key0, warp_key0 + 16});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t key = warp_key0 + lane / 4 + 8 * half;
      seen[half] = batch.queries_of_key(key);
      if (batch.mask && key < batch.keys && !batch.mask[key]) seen[half] = {0, 0};
    }
  }

  float dk[kWantK ? kHead / 8 : 1][4] = {}, dv[kWantV ? kHead / 8 : 1][4] = {};
#pragma unroll 1
  for (int32_t item = 0; item < work.items; ++item) {
    if (item > 0) {
      if (Kernel::kStages == 1) {
        __syncthreads();
        next_query0 = fill(item);
      }
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    const int32_t query0 = next_query0;
    if (Kernel::kStages == 2 && item + 1 < work.items) next_query0 = fill(item + 1);
    if (visible.none(query0, query0 + kQueries)) continue;
    const bool whole = visible.whole(query0, query0 + kQueries);
    const uint32_t q_tile = ring + slot_of(item), dout_tile = q_tile + Kernel::kTileBytes;
    const auto* const stats = reinterpret_cast<const float*>(
        shared + 2 * Kernel::kRowsBytes + slot_of(item) + 2 * Kernel::kTileBytes);

    float weights[kQueries / 8][4] = {};
    multiply_rows<Element, Tile, kQueries>(weights, k_rows, q_tile, offsets);
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const float2 lse2 = *reinterpret_cast<const float2*>(stats + j * 8 + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = ptx::exp2_approx(fmaf(weights[j][i], scale_log2, i % 2 ? -lse2.y : -lse2.x));
        if (!whole) {
          const int32_t query = query0 + j * 8 + lane % 4 * 2 + i % 2;
          if (query < seen[i / 2].lo || query >= seen[i / 2].hi) weight = 0.f;
        }
        weights[j][i] = weight;
      }
    }
    if constexpr (kWantV)
      multiply_weights<Element, Tile, kQueries>(dv, weights, dout_tile, offsets);
    if constexpr (kWantK) {
      float dweights[kQueries / 8][4] = {};
      // Keeps the loads of dout behind the weights: the compiler would begin them before, and
      // spill.
      if (kHead > 128) __syncwarp();
      multiply_rows<Element, Tile, kQueries>(dweights, v_rows, dout_tile, offsets);
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 delta =
            *reinterpret_cast<const float2*>(stats + kQueries + j * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[j][i] *= dweights[j][i] - (i % 2 ? delta.y : delta.x);
      }
      if (kHead > 128) __syncwarp();
      multiply_weights<Element, Tile, kQueries>(dk, weights, q_tile, offsets);
    }
  }

  // A warp's rows of K and V are read by that warp alone: their place takes dk and dv.
  unsigned char* const mine = shared + Tile::bytes(16 * warp);
  if constexpr (kWantK) {
    const HeadsOut& out = work.prefix ? p.dprefix_k : p.dk;
    if (out.data)
      store_key_rows<Element, Tile>(mine, dk, static_cast<float>(problem.scale), out, p.parts_k,
                                    work, problem, warp, lane);
  }
  if constexpr (kWantV) {
    const HeadsOut& out = work.prefix ? p.dprefix_v : p.dv;
    if (out.data)
      store_key_rows<Element, Tile>(mine + Kernel::kRowsBytes, dv, 1.f, out, p.parts_v, work,
                                    problem, warp, lane);
  }
}

}  // namespace fused_peft::cuda
