// Prefix attention, forward: one pass over the keys of the prefix and of the sequence with an
// online softmax in base 2 (Dao, "FlashAttention-2", 2023, algorithm 1), and the combination of
// parts where the keys are split over CTAs.
#pragma once

#include "kernels/cuda/prefix_attention_tile_sm80.cuh"

namespace fused_peft::cuda {

struct AttentionForwardParams {
  PrefixAttentionParams problem;
  HeadsOut out;
  float* lse = nullptr;  // [B, Hq, S]
  float scale_log2 = 1.f;
  // Per (batch row, head), or per (batch row, key head) where queries are packed.
  int32_t query_tiles = 0;
  // Of a shared prefix that the queries of all batch rows read together: tiles of its queries per
  // key head. 0: every batch row reads it with its own keys.
  int32_t cascade_tiles = 0;
  // CTAs that share the keys of a query tile, and of a cascade tile.
  int32_t key_splits = 1, cascade_splits = 0;
  // Of these, first those of the cascade: normalised out [splits, B, Hq, S, D] and log2-sum-exp2
  // [splits, B, Hq, S].
  float *part_out = nullptr, *part_lse = nullptr;
};

template <int kHead, int kRowBlocks>
struct AttentionForward {
  using Tile = HeadTile<kHead>;
  static constexpr int kRows = kRowBlocks * kAttentionRows;
  static constexpr int kKeys = forward_block_keys(kHead, kRows), kStages = 2;
  static constexpr bool kQueriesInRegisters = kRowBlocks == 1 && kHead <= 128;
  // Where there are registers for it.
  static constexpr bool kVoteOnRescale = kHead * kRowBlocks < 256;
  static constexpr int kQueryBytes = Tile::bytes(kRows), kTileBytes = Tile::bytes(kKeys);
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kTileBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

// A lane's two rows of the online softmax: lane / 4 and lane / 4 + 8 of the warp's 16.
struct OnlineSoftmax {
  float largest[2] = {-infinity(), -infinity()};  // of the raw scores so far
  float sum[2] = {0.f, 0.f};                      // this lane's columns

  // Turns scores into weights 2^(scale (score - largest)); returns in `rescale` what earlier sums
  // must be multiplied with.
  template <int kBlocks>
  __device__ void update(float (*scores)[4], float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = largest[half];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
        top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      // A row that has seen no key has no maximum: any finite one gives weights of 0.
      const float shift = top == -infinity() ? 0.f : top * scale_log2;
      rescale[half] = ptx::exp2_approx(fmaf(largest[half], scale_log2, -shift));
      largest[half] = top;
      float added = 0.f;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = ptx::exp2_approx(fmaf(scores[j][i], scale_log2, -shift));
          added += scores[j][i];
        }
      sum[half] = fmaf(sum[half], rescale[half], added);
    }
  }

  // The sums over the row; returns log2 sum exp2 of the scaled scores.
  __device__ void finish(float scale_log2, float (&lse2)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
      lse2[half] =
          sum[half] > 0.f ? fmaf(largest[half], scale_log2, log2f(sum[half])) : -infinity();
    }
  }
};

// Hides what a lane's two queries do not see. first: key of column 0.
template <int kBlocks>
__device__ inline void hide_keys(float (*scores)[4], Range upper, Range lower, const uint8_t* mask,
                                 int32_t first, int lane) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t key = first + j * 8 + lane % 4 * 2 + i % 2;
      const Range& range = i < 2 ? upper : lower;
      if (key < range.lo || key >= range.hi) scores[j][i] = -infinity();
    }
  if (!mask) return;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t key = first + j * 8 + lane % 4 * 2 + i;
      if (key >= lower.hi || mask[key]) continue;
      scores[j][i] = -infinity();
      scores[j][i + 2] = -infinity();
    }
}

// The queries of a CTA and its share of their keys.
//
// Rows [first, first + kRows) of `count`. Packed, a row is (batch row, query head of the group,
// query), of one batch row, or of all where they read a shared prefix together.
template <bool kPacked, int kRows>
struct QueryTile {
  int32_t queries, group;
  int32_t batch = 0, head = 0;  // of row 0; head: the key head, if packed
  int32_t first = 0, count = 0;
  bool cascade = false;
  int32_t split = 0, splits = 1, part = 0;  // part: of the partial results

  __device__ explicit QueryTile(const AttentionForwardParams& p)
      : queries(static_cast<int32_t>(p.problem.queries)),
        group(static_cast<int32_t>(p.problem.q_heads / p.problem.kv_heads)) {
    const PrefixAttentionParams& problem = p.problem;
    const auto heads = static_cast<uint32_t>(kPacked ? problem.kv_heads : problem.q_heads);
    uint32_t block = blockIdx.x;
    auto tiles = static_cast<uint32_t>(p.query_tiles);
    count = queries;
    if constexpr (kPacked) {
      const uint32_t cascade_ctas = heads * p.cascade_tiles * p.cascade_splits;
      cascade = block < cascade_ctas;
      if (cascade)
        tiles = p.cascade_tiles;
      else
        block -= cascade_ctas;
      splits = cascade ? p.cascade_splits : p.key_splits;
      split = static_cast<int32_t>(block % splits);
      part = split + (cascade ? 0 : p.cascade_splits);
      block /= splits;
      count = group * queries * (cascade ? static_cast<int32_t>(problem.batch) : 1);
    }
    uint32_t tile = block % tiles;
    // Under a causal mask the last tiles have the most keys: they go first.
    if (!kPacked && problem.causal) tile = tiles - 1 - tile;
    block /= tiles;
    head = static_cast<int32_t>(block % heads);
    batch = static_cast<int32_t>(block / heads);
    first = static_cast<int32_t>(tile) * kRows;
  }
  __device__ int32_t kv_head() const { return kPacked ? head : head / group; }
  // Of a row of the tile, [0, kRows): whether it exists, and what it is; beyond the last, the last.
  __device__ bool exists(int32_t row) const { return first + row < count; }
  __device__ int32_t clamped(int32_t row) const { return exists(row) ? first + row : count - 1; }
  __device__ int32_t query(int32_t row) const {
    return kPacked ? clamped(row) % queries : clamped(row);
  }
  __device__ int32_t head_of(int32_t row) const {
    return kPacked ? head * group + clamped(row) / queries % group : head;
  }
  __device__ int32_t batch_of(int32_t row) const {
    return kPacked ? batch + clamped(row) / (queries * group) : batch;
  }
  // In [B, Hq, S].
  __device__ int64_t index(const PrefixAttentionParams& p, int32_t row) const {
    return (batch_of(row) * p.q_heads + head_of(row)) * p.queries + query(row);
  }
  // Queries that rows [begin, end) may be of.
  __device__ Range query_range(int32_t begin, int32_t end) const {
    if (kPacked) return {0, queries};
    return {query(begin), query(end - 1) + 1};
  }
};

template <class Element, class Tile, bool kPacked, int kRows>
__device__ inline void fill_queries(uint32_t tile, const HeadsView& view,
                                    const QueryTile<kPacked, kRows>& rows, int32_t head_dim) {
  if constexpr (!kPacked) {
    fill_rows<Element, Tile, kRows>(tile,
                                    head_rows<Element>(view, rows.batch, rows.head, rows.first),
                                    view.row_stride, rows.count - rows.first, head_dim);
  } else {
    constexpr int kChunks = Tile::kCols / kChunk;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kRows;
         row += kAttentionThreads / kChunks)
      ptx::cp_async_16(
          tile + tile_offset<Tile::kCols>(row, chunk),
          head_rows<Element>(view, rows.batch_of(row), rows.head_of(row), rows.query(row)) +
              chunk * kChunk,
          rows.exists(row) && chunk * kChunk < head_dim);
  }
}

// Writes a block of 16 rows of a part that the combining kernel reads. row: this lane's upper one.
template <int kHead, class Rows>
__device__ inline void store_part(const AttentionForwardParams& p, const Rows& rows, int32_t row,
                                  const float (*out)[4], const float (&inverse)[2],
                                  const float (&lse2)[2], int lane) {
  const PrefixAttentionParams& problem = p.problem;
  const int64_t first = rows.part * problem.batch * problem.q_heads * problem.queries;
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!rows.exists(row + 8 * half)) continue;
    const int64_t at = first + rows.index(problem, row + 8 * half);
    if (lane % 4 == 0) p.part_lse[at] = lse2[half];
    float* const to = p.part_out + at * head_dim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kHead / 8; ++j)
      if (j * 8 < head_dim)
        ptx::store_global_v2(to + j * 8, out[j][2 * half] * inverse[half],
                             out[j][2 * half + 1] * inverse[half]);
  }
}

// Writes a block of 16 rows through the 16 rows of shared memory at `tile`, which no other warp
// reads. row: of the block's first.
template <class Element, class Tile, class Rows>
__device__ inline void store_block(const AttentionForwardParams& p, const Rows& rows, int32_t row,
                                   const float (*out)[4], const float (&inverse)[2],
                                   const float (&lse2)[2], unsigned char* tile, int lane) {
  const PrefixAttentionParams& problem = p.problem;
  if (lane % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t at = row + lane / 4 + 8 * half;
      if (rows.exists(at)) p.lse[rows.index(problem, at)] = lse2[half] * kLn2;
    }
  }
  round_rows<Element, Tile>(tile, out, inverse[0], inverse[1], lane);
  store_rows<Element, Tile>(
      tile, static_cast<int32_t>(problem.head_dim), lane, [&](int i) -> Element* {
        const int32_t at = row + i;
        if (!rows.exists(at)) return nullptr;
        return static_cast<Element*>(p.out.data) + rows.batch_of(at) * p.out.batch_stride +
               rows.head_of(at) * p.out.head_stride + rows.query(at) * p.out.row_stride;
      });
}

template <class Element, int kHead, int kRowBlocks, bool kPacked>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_forward_kernel(const __grid_constant__ AttentionForwardParams p) {
  using Kernel = AttentionForward<kHead, kRowBlocks>;
  using Tile = typename Kernel::Tile;
  constexpr int kKeys = Kernel::kKeys, kScores = kKeys / 8, kOut = kHead / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PrefixAttentionParams& problem = p.problem;
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
  const QueryTile<kPacked, Kernel::kRows> rows(p);
  const BatchRow batch(problem, rows.batch);
  const bool own_prefix = !kPacked || p.cascade_tiles == 0;
  KeyTiles<Element, Tile, kKeys> tiles(
      own_prefix || rows.cascade ? problem.prefix : 0,
      rows.cascade ? Range{0, 0} : keys_seen(batch, rows.query_range(0, Kernel::kRows)).some);
  const auto begin = static_cast<int32_t>(int64_t{tiles.count} * rows.split / rows.splits);
  const auto end = static_cast<int32_t>(int64_t{tiles.count} * (rows.split + 1) / rows.splits);

  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t ring = q_tile + Kernel::kQueryBytes;
  const auto slot_of = [&](int32_t tile) {
    return ring + ((tile - begin) & 1) * 2 * Kernel::kTileBytes;
  };
  const auto fill = [&](int32_t tile) {
    if (tile == begin || tile == tiles.prefix_tiles)
      tiles.seek(problem, rows.batch, rows.kv_head(), tile);
    tiles.fill_next(problem, tile, slot_of(tile), slot_of(tile) + Kernel::kTileBytes);
    ptx::cp_async_commit();
  };
  fill_queries<Element, Tile>(q_tile, problem.q, rows, head_dim);
  if (begin < end)
    fill(begin);
  else
    ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  const LaneOffsets<Tile> offsets(lane);
  const int32_t warp_row = warp * 16 * kRowBlocks;
  LeftRows<Tile, Kernel::kQueriesInRegisters, kRowBlocks> q;
  q.load(q_tile + Tile::bytes(warp_row), offsets);
  const bool idle = !rows.exists(warp_row);
  const Visible keys = keys_seen(batch, rows.query_range(warp_row, warp_row + 16 * kRowBlocks));
  const float scale_log2 = p.scale_log2;

  float out[kRowBlocks * kOut][4] = {};
  OnlineSoftmax softmax[kRowBlocks];
#pragma unroll 1
  for (int32_t tile = begin; tile < end; ++tile) {
    if (tile > begin) {
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    if (tile + 1 < end) fill(tile + 1);
    const int32_t key = tiles.key(tile);
    const bool prefix = tiles.in_prefix(tile);
    if (idle || (!prefix && keys.none(key, key + kKeys))) continue;
    float scores[kRowBlocks * kScores][4] = {};
    multiply_rows<Element, Tile, kKeys>(scores, q, slot_of(tile), offsets);
    if (kRowBlocks > 1) __syncwarp();
    if (prefix ? key + kKeys > tiles.prefix : !keys.whole(key, key + kKeys)) {
      const Range whole = {0, tiles.prefix};
      // Looked up anew: most tiles are whole, and registers are dear.
      const auto seen = [&](int row) {
        return prefix ? whole
                      : BatchRow(problem, rows.batch)
                            .keys_of_query(rows.query(warp_row + lane / 4 + row));
      };
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r)
        hide_keys<kScores>(scores + r * kScores, seen(16 * r), seen(16 * r + 8),
                           prefix ? nullptr : BatchRow(problem, rows.batch).mask, key, lane);
    }
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
      float rescale[2];
      softmax[r].template update<kScores>(scores + r * kScores, scale_log2, rescale);
      // Later tiles often leave all rows' largest scores where they were.
      if (Kernel::kVoteOnRescale && __all_sync(0xffffffffu, rescale[0] == 1.f && rescale[1] == 1.f))
        continue;
#pragma unroll
      for (int i = 0; i < 4 * kOut; ++i) out[r * kOut + i / 4][i % 4] *= rescale[i % 4 / 2];
    }
    // Keeps the loads of V behind the scores: the compiler would begin them before, and spill.
    if (kRowBlocks > 1) __syncwarp();
    multiply_weights<Element, Tile, kKeys, kRowBlocks>(out, scores,
                                                       slot_of(tile) + Kernel::kTileBytes, offsets);
  }
  if (idle) return;

#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
    float lse2[2], inverse[2];
    softmax[r].finish(scale_log2, lse2);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      inverse[half] = softmax[r].sum[half] > 0.f ? 1.f / softmax[r].sum[half] : 0.f;
    const int32_t row = warp_row + 16 * r;
    if (kPacked && p.part_out)
      store_part<kHead>(p, rows, row + lane / 4, out + r * kOut, inverse, lse2, lane);
    else
      store_block<Element, Tile>(p, rows, row, out + r * kOut, inverse, lse2,
                                 shared + Tile::bytes(row), lane);
  }
}

// out = sum over splits of 2^(lse2 - largest) part_out / sum, in order. One warp a row.
template <class Element>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_combine_kernel(const __grid_constant__ AttentionForwardParams p) {
  const PrefixAttentionParams& problem = p.problem;
  const int32_t splits = p.cascade_splits + p.key_splits;
  const int64_t all_rows = problem.batch * problem.q_heads * problem.queries;
  const int64_t row = int64_t{blockIdx.x} * (kAttentionThreads / 32) + threadIdx.x / 32;
  if (row >= all_rows) return;
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  float largest = -infinity();
  for (int32_t split = 0; split < splits; ++split)
    largest = fmaxf(largest, p.part_lse[split * all_rows + row]);
  const float shift = largest == -infinity() ? 0.f : largest;
  float sum = 0.f;
  for (int32_t split = 0; split < splits; ++split)
    sum += ptx::exp2_approx(p.part_lse[split * all_rows + row] - shift);
  const float inverse = sum > 0.f ? 1.f / sum : 0.f;

  const int64_t query = row % problem.queries, head_row = row / problem.queries;
  const int64_t head = head_row % problem.q_heads, b = head_row / problem.q_heads;
  if (lane == 0) p.lse[row] = sum > 0.f ? (shift + log2f(sum)) * kLn2 : -infinity();
  Element* out = static_cast<Element*>(p.out.data) + b * p.out.batch_stride +
                 head * p.out.head_stride + query * p.out.row_stride;
  for (int64_t d = 2 * lane; d < problem.head_dim; d += 64) {
    float2 total = {0.f, 0.f};
    for (int32_t split = 0; split < splits; ++split) {
      const int64_t at = split * all_rows + row;
      const float weight = ptx::exp2_approx(p.part_lse[at] - shift) * inverse;
      const auto part = *reinterpret_cast<const float2*>(p.part_out + at * problem.head_dim + d);
      total.x = fmaf(weight, part.x, total.x);
      total.y = fmaf(weight, part.y, total.y);
    }
    *reinterpret_cast<uint32_t*>(out + d) = ElementTraits<Element>::pack(total.x, total.y);
  }
}

}  // namespace fused_peft::cuda
