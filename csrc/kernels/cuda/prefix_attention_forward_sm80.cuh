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
  int32_t query_tiles = 0;
  int32_t key_splits = 1;
  // Of the splits, rows (b, key head, query head of the group, query): normalised out
  // [splits, rows, D] and log2-sum-exp2 [splits, rows].
  float *part_out = nullptr, *part_lse = nullptr;
};

template <int kHead>
struct AttentionForward {
  using Tile = HeadTile<kHead>;
  static constexpr int kKeys = forward_block_keys(kHead), kStages = 2;
  static constexpr bool kQueriesInRegisters = kHead <= 128;
  static constexpr int kQueryBytes = Tile::bytes(kAttentionRows), kTileBytes = Tile::bytes(kKeys);
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
  __device__ void update(float (&scores)[kBlocks][4], float scale_log2, float (&rescale)[2]) {
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
      rescale[half] = exp2f(fmaf(largest[half], scale_log2, -shift));
      largest[half] = top;
      float added = 0.f;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = exp2f(fmaf(scores[j][i], scale_log2, -shift));
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
__device__ inline void hide_keys(float (&scores)[kBlocks][4], const Range (&seen)[2],
                                 const uint8_t* mask, int32_t first, int lane) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t key = first + j * 8 + lane % 4 * 2 + i % 2;
      const Range& range = seen[i / 2];
      if (key < range.lo || key >= range.hi || (mask && !mask[key])) scores[j][i] = -infinity();
    }
}

// Where the rows of a CTA's query tile lie. Packed: the query heads of a group, one after another,
// each with all its queries.
template <bool kPacked>
struct QueryRows {
  int32_t batch, kv_head, first, count;  // rows [first, first + 64) of count
  int32_t head, queries, group;

  __device__ QueryRows(const PrefixAttentionParams& p, int64_t block, int32_t tiles, bool reverse)
      : queries(static_cast<int32_t>(p.queries)),
        group(static_cast<int32_t>(p.q_heads / p.kv_heads)) {
    const auto heads = static_cast<int32_t>(kPacked ? p.kv_heads : p.q_heads);
    int32_t tile = static_cast<int32_t>(block % tiles);
    // Under a causal mask the last tiles have the most keys: they go first.
    if (reverse) tile = tiles - 1 - tile;
    block /= tiles;
    head = static_cast<int32_t>(block % heads);
    batch = static_cast<int32_t>(block / heads);
    kv_head = kPacked ? head : head / group;
    count = kPacked ? group * queries : queries;
    first = tile * kAttentionRows;
  }
  __device__ int32_t query(int32_t row) const {
    const int32_t last = row < count ? row : count - 1;
    return kPacked ? last % queries : last;
  }
  __device__ int32_t head_of(int32_t row) const {
    return kPacked ? head * group + row / queries : head;
  }
  // Of all rows of the tile.
  __device__ Range query_range() const {
    if (kPacked) return {0, queries};
    const int32_t end = first + kAttentionRows;
    return {first, end < queries ? end : queries};
  }
};

template <class Element, class Tile, bool kPacked>
__device__ inline void fill_queries(uint32_t tile, const HeadsView& view,
                                    const QueryRows<kPacked>& rows, int32_t head_dim) {
  if constexpr (!kPacked) {
    fill_rows<Element, Tile, kAttentionRows>(
        tile, head_rows<Element>(view, rows.batch, rows.head, rows.first), view.row_stride,
        rows.count - rows.first, head_dim);
  } else {
    constexpr int kChunks = Tile::kCols / kChunk;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kAttentionRows;
         row += kAttentionThreads / kChunks) {
      const int32_t at = rows.first + row;
      const bool present = at < rows.count && chunk * kChunk < head_dim;
      const Element* from = static_cast<const Element*>(view.data);
      if (present)
        from =
            head_rows<Element>(view, rows.batch, rows.head_of(at), rows.query(at)) + chunk * kChunk;
      ptx::cp_async_16(tile + tile_offset<Tile::kCols>(row, chunk), from, present);
    }
  }
}

template <class Element, int kHead, bool kPacked>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_forward_kernel(const __grid_constant__ AttentionForwardParams p) {
  using Kernel = AttentionForward<kHead>;
  using Tile = typename Kernel::Tile;
  constexpr int kKeys = Kernel::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PrefixAttentionParams& problem = p.problem;
  const auto head_dim = static_cast<int32_t>(problem.head_dim);
  const int32_t split = kPacked ? static_cast<int32_t>(blockIdx.x) % p.key_splits : 0;
  const QueryRows<kPacked> rows(problem, blockIdx.x / (kPacked ? p.key_splits : 1), p.query_tiles,
                                problem.causal);
  const BatchRow batch(problem, rows.batch);
  const Range queries = rows.query_range();
  const Range first = batch.keys_of_query(queries.lo), last = batch.keys_of_query(queries.hi - 1);
  const KeyTiles<Element, kKeys> tiles(problem, rows.batch, rows.kv_head, {first.lo, last.hi});
  const auto begin = static_cast<int32_t>(int64_t{tiles.count} * split / p.key_splits);
  const auto end = static_cast<int32_t>(int64_t{tiles.count} * (split + 1) / p.key_splits);

  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t ring = q_tile + Kernel::kQueryBytes;
  const auto fill = [&](int32_t tile) {
    const uint32_t slot = ring + ((tile - begin) & 1) * 2 * Kernel::kTileBytes;
    tiles.template fill<Tile>(slot, slot + Kernel::kTileBytes, tile, head_dim);
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
  LeftRows<Tile, Kernel::kQueriesInRegisters> q;
  q.load(q_tile + Tile::bytes(16 * warp), offsets);
  const int32_t upper = rows.first + warp * 16 + lane / 4;
  const Range seen[2] = {batch.keys_of_query(rows.query(upper)),
                         batch.keys_of_query(rows.query(upper + 8))};
  const auto scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);
  const bool idle = rows.first + warp * 16 >= rows.count;  // none of the warp's rows exists

  float out[kHead / 8][4] = {};
  OnlineSoftmax softmax;
#pragma unroll 1
  for (int32_t tile = begin; tile < end; ++tile) {
    if (tile > begin) {
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    if (tile + 1 < end) fill(tile + 1);
    if (idle) continue;
    const uint32_t slot = ring + ((tile - begin) & 1) * 2 * Kernel::kTileBytes;
    float scores[kKeys / 8][4] = {};
    multiply_rows<Element, Tile, kKeys>(scores, q, slot, offsets);
    const int32_t key = tiles.key(tile);
    if (tiles.in_prefix(tile)) {
      if (key + kKeys > tiles.prefix) {
        const Range whole[2] = {{0, tiles.prefix}, {0, tiles.prefix}};
        hide_keys(scores, whole, nullptr, key, lane);
      }
    } else if (batch.mask || key < last.lo || key + kKeys > first.hi) {
      hide_keys(scores, seen, batch.mask, key, lane);
    }
    float rescale[2];
    softmax.update(scores, scale_log2, rescale);
#pragma unroll
    for (int j = 0; j < kHead / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] *= rescale[i / 2];
    multiply_weights<Element, Tile, kKeys>(out, scores, slot + Kernel::kTileBytes, offsets);
  }
  if (idle) return;

  float lse2[2];
  softmax.finish(scale_log2, lse2);
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    inverse[half] = softmax.sum[half] > 0.f ? 1.f / softmax.sum[half] : 0.f;

  if (kPacked && p.key_splits > 1) {
    const int64_t all_rows = problem.batch * problem.kv_heads * rows.count;
    const int64_t row0 = (int64_t{rows.batch} * problem.kv_heads + rows.kv_head) * rows.count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (upper + 8 * half >= rows.count) continue;
      const int64_t at = split * all_rows + row0 + upper + 8 * half;
      if (lane % 4 == 0) p.part_lse[at] = lse2[half];
#pragma unroll
      for (int j = 0; j < kHead / 8; ++j)
        if (j * 8 < head_dim)
          ptx::store_global_v2(p.part_out + at * head_dim + j * 8 + lane % 4 * 2,
                               out[j][2 * half] * inverse[half],
                               out[j][2 * half + 1] * inverse[half]);
    }
    return;
  }
  if (lane % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = upper + 8 * half;
      if (row < rows.count)
        p.lse[(int64_t{rows.batch} * problem.q_heads + rows.head_of(row)) * problem.queries +
              rows.query(row)] = lse2[half] * kLn2;
    }
  }
  unsigned char* const mine = shared + Tile::bytes(16 * warp);
  round_rows<Element, Tile>(mine, out, inverse[0], inverse[1], lane);
  store_rows<Element, Tile>(mine, head_dim, lane, [&](int row) -> Element* {
    const int32_t at = rows.first + warp * 16 + row;
    if (at >= rows.count) return nullptr;
    return static_cast<Element*>(p.out.data) + rows.batch * p.out.batch_stride +
           rows.head_of(at) * p.out.head_stride + rows.query(at) * p.out.row_stride;
  });
}

// out = sum over splits of 2^(lse2 - largest) part_out / sum, in order. One warp a row.
template <class Element>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_combine_kernel(const __grid_constant__ AttentionForwardParams p) {
  const PrefixAttentionParams& problem = p.problem;
  const int64_t group_rows = problem.q_heads / problem.kv_heads * problem.queries;
  const int64_t all_rows = problem.batch * problem.kv_heads * group_rows;
  const int64_t row = int64_t{blockIdx.x} * (kAttentionThreads / 32) + threadIdx.x / 32;
  if (row >= all_rows) return;
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  float largest = -infinity();
  for (int32_t split = 0; split < p.key_splits; ++split)
    largest = fmaxf(largest, p.part_lse[split * all_rows + row]);
  const float shift = largest == -infinity() ? 0.f : largest;
  float sum = 0.f;
  for (int32_t split = 0; split < p.key_splits; ++split)
    sum += exp2f(p.part_lse[split * all_rows + row] - shift);
  const float inverse = sum > 0.f ? 1.f / sum : 0.f;

  const int64_t query = row % problem.queries, head_row = row / problem.queries;
  const int64_t head = head_row % problem.q_heads, b = head_row / problem.q_heads;
  if (lane == 0)
    p.lse[(b * problem.q_heads + head) * problem.queries + query] =
        sum > 0.f ? (shift + log2f(sum)) * kLn2 : -infinity();
  Element* out = static_cast<Element*>(p.out.data) + b * p.out.batch_stride +
                 head * p.out.head_stride + query * p.out.row_stride;
  for (int64_t d = 2 * lane; d < problem.head_dim; d += 64) {
    float2 total = {0.f, 0.f};
    for (int32_t split = 0; split < p.key_splits; ++split) {
      const int64_t at = split * all_rows + row;
      const float weight = exp2f(p.part_lse[at] - shift) * inverse;
      const auto part = *reinterpret_cast<const float2*>(p.part_out + at * problem.head_dim + d);
      total.x = fmaf(weight, part.x, total.x);
      total.y = fmaf(weight, part.y, total.y);
    }
    *reinterpret_cast<uint32_t*>(out + d) = ElementTraits<Element>::pack(total.x, total.y);
  }
}

}  // namespace fused_peft::cuda
