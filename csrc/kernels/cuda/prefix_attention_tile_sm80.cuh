// What the kernels of prefix attention share: which keys a query sees, tiles of rows and where they
// lie, warp products on them.
//
// A CTA has four warps. Each owns one or two blocks of 16 rows of the left operand and loops over
// tiles of the right one; the scores of its rows become the next product's left operand in
// registers.
#pragma once

#include <cstdint>

#include "kernels/cuda/prefix_attention_config.h"
#include "kernels/cuda/tile.cuh"
#include "kernels/prefix_attention.h"
#include "kernels/ptx/exp2.cuh"
#include "kernels/ptx/store.cuh"

namespace fused_peft::cuda {

constexpr int kAttentionThreads = 128;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// ---- visibility

struct Range {
  int32_t lo, hi;  // [lo, hi)
};

// One batch row's keys and where its queries stand among them.
struct BatchRow {
  int64_t start;        // position of query 0
  int32_t keys;         // key_lengths, or T
  const uint8_t* mask;  // [T] or null
  int64_t window;       // 0: none
  int32_t queries;
  bool causal;

  __device__ BatchRow(const PrefixAttentionParams& p, int32_t b)
      : keys(static_cast<int32_t>(p.keys)),
        mask(p.key_mask ? p.key_mask + b * p.key_mask_stride : nullptr),
        queries(static_cast<int32_t>(p.queries)),
        causal(p.causal) {
    constexpr int64_t kFar = int64_t{1} << 40;  // beyond any position, far from overflow
    window = p.window < kFar ? p.window : kFar;
    start = p.query_start ? p.query_start[b * p.query_start_stride] : p.keys - p.queries;
    start = start < -kFar ? -kFar : start > kFar ? kFar : start;
    if (p.key_lengths) keys = clamp(p.key_lengths[b], keys);
  }

  __device__ static int32_t clamp(int64_t v, int32_t most) {
    return v < 0 ? 0 : v > most ? most : static_cast<int32_t>(v);
  }

  // Keys that a query sees, but for the mask's holes. Both ends rise with the query.
  __device__ Range keys_of_query(int32_t query) const {
    const int64_t position = start + query;
    Range range = {0, keys};
    if (causal) range.hi = clamp(position + 1, range.hi);
    if (window > 0) {
      range.lo = clamp(position - window + 1, keys);
      range.hi = clamp(position + window, range.hi);
    }
    return range;
  }

  // Queries that see a key, but for the mask's holes. Both ends rise with the key, up to `keys`.
  __device__ Range queries_of_key(int32_t key) const {
    if (key >= keys) return {0, 0};
    const int64_t at = key - start;  // the query that stands at the key
    Range range = {0, queries};
    if (causal) range.lo = clamp(at, queries);
    if (window > 0) {
      const int32_t lo = clamp(at - window + 1, queries);
      range.lo = lo > range.lo ? lo : range.lo;
      range.hi = clamp(at + window, queries);
    }
    return range;
  }
};

// Of a range of queries (or keys): the keys (or queries) that some of them see (are seen by), and
// those that all of them do.
struct Visible {
  Range some = {0, 0}, all = {0, 0};
  // Whether nothing of [begin, end) is seen by any, or all of it by all.
  __device__ bool none(int32_t begin, int32_t end) const {
    return begin >= some.hi || end <= some.lo;
  }
  __device__ bool whole(int32_t begin, int32_t end) const {
    return begin >= all.lo && end <= all.hi;
  }
};

__device__ inline Visible keys_seen(const BatchRow& batch, Range queries) {
  const Range first = batch.keys_of_query(queries.lo), last = batch.keys_of_query(queries.hi - 1);
  Visible keys = {{first.lo, last.hi}, {last.lo, first.hi}};
  if (batch.mask) keys.all = {0, 0};
  return keys;
}

__device__ inline Visible queries_seeing(const BatchRow& batch, Range keys) {
  const int32_t end = keys.hi < batch.keys ? keys.hi : batch.keys;
  if (keys.lo >= end) return {};
  const Range first = batch.queries_of_key(keys.lo), last = batch.queries_of_key(end - 1);
  Visible queries = {{first.lo, last.hi}, {last.lo, first.hi}};
  if (batch.mask || end < keys.hi) queries.all = {0, 0};
  return queries;
}

// ---- tiles of rows

// A tile [rows][kCols] of which kHead columns are used; kCols is a power of two.
template <int kHead_>
struct HeadTile {
  static constexpr int kHead = kHead_;
  static constexpr int kCols = kHead <= 64 ? 64 : kHead <= 128 ? 128 : 256;
  static constexpr int kRowBytes = kCols * 2;
  static constexpr int kSteps = kHead / 16;
  static_assert(kHead % 16 == 0 && kHead <= kCols);
  static constexpr int bytes(int rows) { return rows * kRowBytes; }
};

// A thread copies one chunk of every kStep-th row of a tile.
template <class Tile>
struct RowCopy {
  static constexpr int kChunks = Tile::kCols / kChunk, kStep = kAttentionThreads / kChunks;
  __device__ static int row() { return static_cast<int>(threadIdx.x) / kChunks; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }

  // The thread's first chunk of [rows, D].
  template <class Element>
  __device__ static const Element* first(const Element* rows, int64_t row_stride) {
    return rows + row() * row_stride + chunk() * kChunk;
  }
  // Rows that exist from the thread's first one on, of `rows`; none beyond D.
  __device__ static int32_t left(int32_t rows, int32_t head_dim) {
    return chunk() * kChunk < head_dim ? rows - row() : 0;
  }
  // Fills the next kRows rows, with zeros from `left` on; moves `from` behind them.
  template <int kRows, class Element>
  __device__ static void fill(uint32_t tile, const Element*& from, int64_t row_stride,
                              int32_t left) {
    if (chunk() * kChunk >= Tile::kHead) return;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      ptx::cp_async_16(tile + tile_offset<Tile::kCols>(row() + i * kStep, chunk()), from,
                       i * kStep < left);
      from += kStep * row_stride;
    }
  }
};

// Copies rows [0, valid) of [rows, D] to a tile, zeros for the others and beyond D.
template <class Element, class Tile, int kRows>
__device__ inline void fill_rows(uint32_t tile, const Element* rows, int64_t row_stride,
                                 int32_t valid, int32_t head_dim) {
  const Element* from = RowCopy<Tile>::first(rows, row_stride);
  RowCopy<Tile>::template fill<kRows>(tile, from, row_stride, RowCopy<Tile>::left(valid, head_dim));
}

template <class Element>
__device__ inline const Element* head_rows(const HeadsView& view, int64_t b, int64_t h, int64_t i) {
  return static_cast<const Element*>(view.data) + b * view.batch_stride + h * view.head_stride +
         i * view.row_stride;
}

// The tiles of keys that a CTA visits, in order: those of the prefix, then those of the sequence
// that any of its queries sees.
template <class Element, class Tile, int kKeys>
struct KeyTiles {
  int32_t prefix, prefix_tiles, first_key, end_key, count;
  // Of the tile that is filled next: this thread's chunks, and its rows that exist from there on.
  const Element *k = nullptr, *v = nullptr;
  int32_t left = 0;

  // keys: of the sequence.
  __device__ KeyTiles(int64_t prefix_keys, Range keys)
      : prefix(static_cast<int32_t>(prefix_keys)),
        prefix_tiles((prefix + kKeys - 1) / kKeys),
        first_key(keys.lo / kKeys * kKeys),
        end_key(keys.hi) {
    const int32_t length = end_key > keys.lo ? end_key - first_key : 0;
    count = prefix_tiles + (length + kKeys - 1) / kKeys;
  }

  __device__ bool in_prefix(int32_t tile) const { return tile < prefix_tiles; }
  // Of the tile's first key, in the prefix or the sequence.
  __device__ int32_t key(int32_t tile) const {
    return in_prefix(tile) ? tile * kKeys : first_key + (tile - prefix_tiles) * kKeys;
  }

  // The next fill is of `tile`.
  __device__ void seek(const PrefixAttentionParams& p, int32_t b, int32_t kv_head, int32_t tile) {
    const bool before = in_prefix(tile);
    const HeadsView& keys = before ? p.prefix_k : p.k;
    const HeadsView& values = before ? p.prefix_v : p.v;
    const int32_t at = key(tile);
    left = RowCopy<Tile>::left((before ? prefix : end_key) - at, static_cast<int32_t>(p.head_dim));
    k = RowCopy<Tile>::first(head_rows<Element>(keys, b, kv_head, at), keys.row_stride);
    v = RowCopy<Tile>::first(head_rows<Element>(values, b, kv_head, at), values.row_stride);
  }

  __device__ void fill_next(const PrefixAttentionParams& p, int32_t tile, uint32_t k_tile,
                            uint32_t v_tile) {
    // Strides are read again rather than kept in registers.
    const bool before = in_prefix(tile);
    RowCopy<Tile>::template fill<kKeys>(k_tile, k, (before ? p.prefix_k : p.k).row_stride, left);
    RowCopy<Tile>::template fill<kKeys>(v_tile, v, (before ? p.prefix_v : p.v).row_stride, left);
    left -= kKeys;
  }
};

// ---- products of one warp

// Byte offsets of a lane's row in a fragment at column 0. A step of 16 columns flips bits 5 and up
// of the offset, 16 rows add 16 row lengths: see tile_offset.
template <class Tile>
struct LaneOffsets {
  uint32_t columns;  // b_fragment: a right operand [n][k]
  uint32_t rows;     // a_fragment [m][k], and b_fragment_trans [k][n]
  __device__ explicit LaneOffsets(int lane)
      : columns(b_fragment<Tile::kCols>(0, 0, lane)), rows(a_fragment<Tile::kCols>(0, 0, lane)) {}
};

// The left operand of a product over D: blocks of 16 rows, in registers or read from their tile at
// each step.
template <class Tile, bool kInRegisters, int kRowBlocks = 1>
struct LeftRows {
  uint32_t fragment[kInRegisters ? kRowBlocks * Tile::kSteps : 1][4];
  uint32_t base, offset;

  // tile: of the warp's rows.
  __device__ void load(uint32_t tile, const LaneOffsets<Tile>& lane) {
    base = tile;
    offset = lane.rows;
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kRowBlocks * Tile::kSteps; ++i)
        read(i / Tile::kSteps, i % Tile::kSteps, fragment[i]);
    }
  }
  __device__ void at(int block, int step, uint32_t (&a)[4]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = fragment[block * Tile::kSteps + step][i];
    } else {
      read(block, step, a);
    }
  }

 private:
  __device__ void read(int block, int step, uint32_t (&a)[4]) const {
    ptx::ldmatrix_x4(a, base + (offset ^ (step * 32)) + block * Tile::bytes(16));
  }
};

// acc += left (blocks of 16 rows of D) times the rows of a tile [kColumns][D], transposed. Block
// r's accumulators begin at acc[r * kColumns / 8].
template <class Element, class Tile, int kColumns, bool kInRegisters, int kRowBlocks>
__device__ inline void multiply_rows(float (&acc)[kRowBlocks * kColumns / 8][4],
                                     const LeftRows<Tile, kInRegisters, kRowBlocks>& left,
                                     uint32_t tile, const LaneOffsets<Tile>& lane) {
  // Rolled for the widest heads, whose accumulators leave no registers for early loads.
  constexpr int kUnroll = kInRegisters || Tile::kSteps <= 6 ? Tile::kSteps : 4;
#pragma unroll kUnroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    uint32_t a[kRowBlocks][4];
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) left.at(r, step, a[r]);
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, tile + (lane.columns ^ (step * 32)) + pair * Tile::bytes(16));
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        const int at = r * (kColumns / 8) + 2 * pair;
        mma16<Element>(acc[at], a[r], b[0], b[1]);
        mma16<Element>(acc[at + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// acc += weights [16, kColumns] of each block, rounded to Element, times a tile [kColumns][D].
template <class Element, class Tile, int kColumns, int kRowBlocks = 1>
__device__ inline void multiply_weights(float (&acc)[kRowBlocks * Tile::kHead / 8][4],
                                        const float (&weights)[kRowBlocks * kColumns / 8][4],
                                        uint32_t tile, const LaneOffsets<Tile>& lane) {
  using Traits = ElementTraits<Element>;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t a[kRowBlocks][4];
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&block)[4] = weights[r * (kColumns / 8) + 2 * k + i / 2];
        a[r][i] = Traits::pack(block[i % 2 * 2], block[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int pair = 0; pair < Tile::kSteps; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, tile + (lane.rows ^ (pair * 32)) + k * Tile::bytes(16));
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        const int at = r * (Tile::kHead / 8) + 2 * pair;
        mma16<Element>(acc[at], a[r], b[0], b[1]);
        mma16<Element>(acc[at + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// Rounds 16 rows [kHead / 8] of accumulators into a tile of their warp's own.
template <class Element, class Tile>
__device__ inline void round_rows(unsigned char* tile, const float (*acc)[4], float upper,
                                  float lower, int lane) {
  using Traits = ElementTraits<Element>;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < Tile::kHead / 8; ++j) {
    const int row = lane / 4, byte = lane % 4 * 4;
    *reinterpret_cast<uint32_t*>(tile + tile_offset<Tile::kCols>(row, j) + byte) =
        Traits::pack(acc[j][0] * upper, acc[j][1] * upper);
    *reinterpret_cast<uint32_t*>(tile + tile_offset<Tile::kCols>(row + 8, j) + byte) =
        Traits::pack(acc[j][2] * lower, acc[j][3] * lower);
  }
  __syncwarp();
}

// Writes 16 rounded rows to memory in chunks of 16 bytes; to(row): where a row goes, null for
// nowhere.
template <class Element, class Tile, class To>
__device__ inline void store_rows(const unsigned char* tile, int32_t head_dim, int lane,
                                  const To& to) {
  constexpr int kChunks = Tile::kCols / kChunk, kStep = 32 / kChunks;
  const int chunk = lane % kChunks;
#pragma unroll
  for (int row = lane / kChunks; row < 16; row += kStep) {
    Element* const at = to(row);
    if (at && chunk * kChunk < head_dim)
      ptx::store_global_v4(at + chunk * kChunk, *reinterpret_cast<const uint4*>(
                                                    tile + tile_offset<Tile::kCols>(row, chunk)));
  }
}

}  // namespace fused_peft::cuda
