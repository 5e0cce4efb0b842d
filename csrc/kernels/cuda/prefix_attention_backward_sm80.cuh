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

// ---- delta
// -----------------------------------------------------------------------------------------

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

// ---- dq
// --------------------------------------------------------------------------------------------

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
  const Range first = batch.keys_of_query(q0), last = batch.keys_of_query(q1 - 1);
  const KeyTiles<Element, kKeys> tiles(problem, b, kv_head, {first.lo, last.hi});

  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t dout_tile = q_tile + Kernel::kRowsBytes;
  const uint32_t ring = dout_tile + Kernel::kRowsBytes;
  const auto slot_of = [&](int32_t tile) {
    return ring + (Kernel::kStages == 2 ? tile & 1 : 0) * 2 * Kernel::kTileBytes;
  };
  const auto fill = [&](int32_t tile) {
    tiles.template fill<Tile>(slot_of(tile), slot_of(tile) + Kernel::kTileBytes, tile, head_dim);
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
  const int32_t upper = q0 + warp * 16 + lane / 4;
  const int64_t stats = (int64_t{b} * problem.q_heads + head) * p.padded_queries + upper;
  const float lse2[2] = {p.lse2[stats], p.lse2[stats + 8]};
  const float delta[2] = {p.delta[stats], p.delta[stats + 8]};
  const Range seen[2] = {batch.keys_of_query(upper), batch.keys_of_query(upper + 8)};
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
    const uint32_t k_tile = slot_of(tile), v_tile = k_tile + Kernel::kTileBytes;
    float weights[kKeys / 8][4] = {}, dweights[kKeys / 8][4] = {};
    multiply_rows<Element, Tile, kKeys>(weights, q, k_tile, offsets);
    multiply_rows<Element, Tile, kKeys>(dweights, dout, v_tile, offsets);
    const int32_t key0 = tiles.key(tile);
    const bool prefix = tiles.in_prefix(tile);
    const bool whole = prefix ? key0 + kKeys <= tiles.prefix
                              : !batch.mask && key0 >= last.lo && key0 + kKeys <= first.hi;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = exp2f(fmaf(weights[j][i], scale_log2, -lse2[i / 2]));
        if (!whole) {
          const int32_t key = key0 + j * 8 + lane % 4 * 2 + i % 2;
          const Range range = prefix ? Range{0, tiles.prefix} : seen[i / 2];
          if (key < range.lo || key >= range.hi || (!prefix && batch.mask && !batch.mask[key]))
            weight = 0.f;
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

// ---- dk and dv
// -------------------------------------------------------------------------------------

// Wide heads leave registers for one of dk and dv: two launches, which recompute the scores.
template <int kHead, bool kWantK, bool kWantV>
struct AttentionDkv {
  using Tile = HeadTile<kHead>;
  static constexpr int kQueries = backward_block(kHead);
  static constexpr int kStages = kHead <= 128 ? 2 : 1;
  static constexpr int kRowsBytes = Tile::bytes(kAttentionRows), kTileBytes = Tile::bytes(kQueries);
  static constexpr int kStageBytes = 2 * kTileBytes + 2 * kQueries * 4;  // q, dout, lse2, delta
  static constexpr int kSharedBytes = 2 * kRowsBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

// A CTA's key tile and its share of the (batch row, query head, query tile) items that see it.
struct KeyTileWork {
  bool prefix = false;
  int32_t b = 0, kv_head = 0, key0 = 0, split = 0;
  int32_t first_tile = 0, tiles = 0;  // query tiles of an item's head
  int64_t begin = 0, end = 0;         // items; item / tiles = (batch row - b) * group + head

  __device__ KeyTileWork(const AttentionBackwardParams& p, int32_t block_queries) {
    const PrefixAttentionParams& problem = p.problem;
    const int64_t group = problem.q_heads / problem.kv_heads;
    int64_t block = blockIdx.x;
    const int32_t prefix_rows =
        problem.shared_prefix ? p.prefix_splits : static_cast<int32_t>(problem.batch);
    const int64_t prefix_ctas = problem.kv_heads * p.prefix_tiles * prefix_rows;
    prefix = block < prefix_ctas;
    if (!prefix) block -= prefix_ctas;
    const int32_t key_tiles = prefix ? p.prefix_tiles : p.key_tiles;
    key0 = static_cast<int32_t>(block % key_tiles) * kAttentionRows;
    block /= key_tiles;
    kv_head = static_cast<int32_t>(block % problem.kv_heads);
    const auto outer = static_cast<int32_t>(block / problem.kv_heads);
    if (prefix && problem.shared_prefix)
      split = outer;
    else
      b = outer;
    Range seen = {0, static_cast<int32_t>(problem.queries)};
    if (!prefix) {
      const BatchRow batch(problem, b);
      const int32_t after = key0 + kAttentionRows;
      const int32_t last = (after < batch.keys ? after : batch.keys) - 1;
      seen = last < key0 ? Range{0, 0}
                         : Range{batch.queries_of_key(key0).lo, batch.queries_of_key(last).hi};
    }
    first_tile = seen.lo / block_queries;
    tiles = seen.hi > seen.lo ? (seen.hi - 1) / block_queries + 1 - first_tile : 0;
    const bool shared = prefix && problem.shared_prefix;
    const int64_t items = tiles * group * (shared ? problem.batch : 1);
    begin = shared ? items * split / p.prefix_splits : 0;
    end = shared ? items * (split + 1) / p.prefix_splits : items;
  }
};

template <class Element, class Tile>
__device__ inline void store_key_rows(unsigned char* tile, const float (&acc)[Tile::kHead / 8][4],
                                      float scale, const HeadsOut& out, float* parts,
                                      const KeyTileWork& work, const PrefixAttentionParams& problem,
                                      int warp, int lane) {
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
  const auto count = static_cast<int32_t>(work.prefix ? problem.prefix : problem.keys);
  const int32_t key0 = work.key0 + warp * 16;
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
    return static_cast<Element*>(out.data) + work.b * out.batch_stride +
           work.kv_head * out.head_stride + (key0 + row) * out.row_stride;
  });
}

template <class Element, int kHead, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dkv_kernel(const __grid_constant__ AttentionBackwardParams p) {
  using Kernel = AttentionDkv<kHead, kWantK, kWantV>;
  using Tile = typename Kernel::Tile;
  constexpr int kQueries = Kernel::kQueries;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PrefixAttentionParams& problem = p.problem;
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
  const auto queries = static_cast<int32_t>(problem.queries);
  const auto group = static_cast<int32_t>(problem.q_heads / problem.kv_heads);
  const KeyTileWork work(p, kQueries);

  const uint32_t k_tile = ptx::shared_address(shared);
  const uint32_t v_tile = k_tile + Kernel::kRowsBytes;
  const uint32_t ring = v_tile + Kernel::kRowsBytes;
  const auto slot_of = [&](int64_t item) {
    return (Kernel::kStages == 2 ? static_cast<int32_t>(item - work.begin) & 1 : 0) *
           Kernel::kStageBytes;
  };
  const auto fill = [&](int64_t item) {
    const int64_t unit = item / work.tiles;
    const int32_t query0 =
        (work.first_tile + static_cast<int32_t>(item - unit * work.tiles)) * kQueries;
    const int64_t b = work.b + unit / group, head = int64_t{work.kv_head} * group + unit % group;
    const uint32_t slot = ring + slot_of(item);
    const int32_t valid = queries - query0;
    fill_rows<Element, Tile, kQueries>(slot, head_rows<Element>(problem.q, b, head, query0),
                                       problem.q.row_stride, valid, head_dim);
    fill_rows<Element, Tile, kQueries>(slot + Kernel::kTileBytes,
                                       head_rows<Element>(p.dout, b, head, query0),
                                       p.dout.row_stride, valid, head_dim);
    constexpr int kChunks = kQueries / 4;  // 16 bytes of floats
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < 2 * kChunks) {
      const float* from = thread < kChunks ? p.lse2 : p.delta;
      ptx::cp_async_16(
          slot + 2 * Kernel::kTileBytes + thread * 16,
          from + (b * problem.q_heads + head) * p.padded_queries + query0 + thread % kChunks * 4,
          true);
    }
    ptx::cp_async_commit();
  };

  const HeadsView& k = work.prefix ? problem.prefix_k : problem.k;
  const HeadsView& v = work.prefix ? problem.prefix_v : problem.v;
  const auto count = static_cast<int32_t>(work.prefix ? problem.prefix : problem.keys);
  fill_rows<Element, Tile, kAttentionRows>(k_tile,
                                           head_rows<Element>(k, work.b, work.kv_head, work.key0),
                                           k.row_stride, count - work.key0, head_dim);
  if (kWantK)
    fill_rows<Element, Tile, kAttentionRows>(v_tile,
                                             head_rows<Element>(v, work.b, work.kv_head, work.key0),
                                             v.row_stride, count - work.key0, head_dim);
  if (work.begin < work.end)
    fill(work.begin);
  else
    ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  const LaneOffsets<Tile> offsets(lane);
  LeftRows<Tile, false> k_rows, v_rows;
  k_rows.load(k_tile + Tile::bytes(16 * warp), offsets);
  v_rows.load(v_tile + Tile::bytes(16 * warp), offsets);
  const auto scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);

  // The queries that see this lane's two keys, and those that all of the CTA's keys are seen by.
  Range seen[2] = {{0, queries}, {0, queries}}, by_all = {0, queries};
  if (!work.prefix) {
    const BatchRow batch(problem, work.b);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t key = work.key0 + warp * 16 + lane / 4 + 8 * half;
      seen[half] = batch.queries_of_key(key);
      if (batch.mask && key < batch.keys && !batch.mask[key]) seen[half] = {0, 0};
    }
    by_all = {batch.queries_of_key(work.key0 + kAttentionRows - 1).lo,
              batch.queries_of_key(work.key0).hi};
    if (batch.mask || work.key0 + kAttentionRows > batch.keys) by_all = {0, 0};
  }

  float dk[kWantK ? kHead / 8 : 1][4] = {}, dv[kWantV ? kHead / 8 : 1][4] = {};
#pragma unroll 1
  for (int64_t item = work.begin; item < work.end; ++item) {
    if (item > work.begin) {
      if (Kernel::kStages == 1) {
        __syncthreads();
        fill(item);
      }
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    if (Kernel::kStages == 2 && item + 1 < work.end) fill(item + 1);
    const uint32_t q_tile = ring + slot_of(item), dout_tile = q_tile + Kernel::kTileBytes;
    const auto* const stats = reinterpret_cast<const float*>(
        shared + 2 * Kernel::kRowsBytes + slot_of(item) + 2 * Kernel::kTileBytes);
    const int32_t query0 = (work.first_tile + static_cast<int32_t>(item % work.tiles)) * kQueries;
    const bool whole = query0 >= by_all.lo && query0 + kQueries <= by_all.hi;

    float weights[kQueries / 8][4] = {};
    multiply_rows<Element, Tile, kQueries>(weights, k_rows, q_tile, offsets);
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const float2 lse2 = *reinterpret_cast<const float2*>(stats + j * 8 + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = exp2f(fmaf(weights[j][i], scale_log2, i % 2 ? -lse2.y : -lse2.x));
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
      multiply_rows<Element, Tile, kQueries>(dweights, v_rows, dout_tile, offsets);
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 delta =
            *reinterpret_cast<const float2*>(stats + kQueries + j * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[j][i] *= dweights[j][i] - (i % 2 ? delta.y : delta.x);
      }
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
