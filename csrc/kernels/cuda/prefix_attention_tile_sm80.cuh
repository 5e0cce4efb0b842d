// What the kernels of prefix attention share: which keys a query sees, tiles of rows and where they
// lie, warp products on them.
//
// A CTA has four warps. Each owns 16 rows of the left operand and loops over tiles of the right
// one; scores of 16 rows become the next product's left operand in registers.
#pragma once

#include <cstdint>

#include "kernels/cuda/prefix_attention_config.h"
#include "kernels/cuda/tile.cuh"
#include "kernels/prefix_attention.h"
#include "kernels/ptx/store.cuh"

namespace fused_peft::cuda {

constexpr int kAttentionThreads = 128;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// ---- visibility
// ----------------------------------------------------------------------------------

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

// ---- tiles of rows
// ---------------------------------------------------------------------------------

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

// Copies rows [0, valid) of [rows, D] to a tile, zeros for the others and beyond D.
template <class Element, class Tile, int kRows>
__device__ inline void fill_rows(uint32_t tile, const Element* rows, int64_t row_stride,
                                 int32_t valid, int32_t head_dim) {
  constexpr int kChunks = Tile::kCols / kChunk, kStep = kAttentionThreads / kChunks;
  const int row = static_cast<int>(threadIdx.x) / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  if (chunk * kChunk >= Tile::kHead) return;
  if (chunk * kChunk >= head_dim) valid = 0;
  const Element* from = rows + row * row_stride + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const bool present = row + i * kStep < valid;
    ptx::cp_async_16(tile + tile_offset<Tile::kCols>(row + i * kStep, chunk),
                     present ? from + i * kStep * row_stride : rows, present);
  }
}

template <class Element>
__device__ inline const Element* head_rows(const HeadsView& view, int64_t b, int64_t h, int64_t i) {
  return static_cast<const Element*>(view.data) + b * view.batch_stride + h * view.head_stride +
         i * view.row_stride;
}

// The tiles of keys that a CTA visits: those of the prefix, then those of the sequence that any of
// its queries sees.
template <class Element, int kKeys>
struct KeyTiles {
  const Element *k, *v, *prefix_k, *prefix_v;
  int64_t k_stride, v_stride, prefix_k_stride, prefix_v_stride;
  int32_t prefix, prefix_tiles, first_key, end_key, count;

  __device__ KeyTiles(const PrefixAttentionParams& p, int32_t b, int32_t kv_head, Range keys)
      : k(head_rows<Element>(p.k, b, kv_head, 0)),
        v(head_rows<Element>(p.v, b, kv_head, 0)),
        prefix_k(head_rows<Element>(p.prefix_k, b, kv_head, 0)),
        prefix_v(head_rows<Element>(p.prefix_v, b, kv_head, 0)),
        k_stride(p.k.row_stride),
        v_stride(p.v.row_stride),
        prefix_k_stride(p.prefix_k.row_stride),
        prefix_v_stride(p.prefix_v.row_stride),
        prefix(static_cast<int32_t>(p.prefix)),
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

  template <class Tile>
  __device__ void fill(uint32_t k_tile, uint32_t v_tile, int32_t tile, int32_t head_dim) const {
    const bool before = in_prefix(tile);
    const int64_t first = key(tile);
    const int32_t valid = (before ? prefix : end_key) - static_cast<int32_t>(first);
    const int64_t ks = before ? prefix_k_stride : k_stride;
    const int64_t vs = before ? prefix_v_stride : v_stride;
    fill_rows<Element, Tile, kKeys>(k_tile, (before ? prefix_k : k) + first * ks, ks, valid,
                                    head_dim);
    fill_rows<Element, Tile, kKeys>(v_tile, (before ? prefix_v : v) + first * vs, vs, valid,
                                    head_dim);
  }
};

// ---- products of one warp
// --------------------------------------------------------------------------

// Byte offsets of a lane's row in a fragment at column 0. A step of 16 columns flips bits 5 and up
// of the offset, 16 rows add 16 row lengths: see tile_offset.
template <class Tile>
struct LaneOffsets {
  uint32_t columns;  // b_fragment: a right operand [n][k]
  uint32_t rows;     // a_fragment [m][k], and b_fragment_trans [k][n]
  __device__ explicit LaneOffsets(int lane)
      : columns(b_fragment<Tile::kCols>(0, 0, lane)), rows(a_fragment<Tile::kCols>(0, 0, lane)) {}
};

// The left operand of a product over D: 16 rows, in registers or read from their tile at each step.
template <class Tile, bool kInRegisters>
struct LeftRows {
  uint32_t fragment[kInRegisters ? Tile::kSteps : 1][4];
  uint32_t base, offset;

  // tile: of the warp's 16 rows.
  __device__ void load(uint32_t tile, const LaneOffsets<Tile>& lane) {
    base = tile;
    offset = lane.rows;
    if (kInRegisters) {
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step)
        ptx::ldmatrix_x4(fragment[step], base + (offset ^ (step * 32)));
    }
  }
  __device__ void at(int step, uint32_t (&a)[4]) const {
    if (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = fragment[kInRegisters ? step : 0][i];
    } else {
      ptx::ldmatrix_x4(a, base + (offset ^ (step * 32)));
    }
  }
};

// acc [16, kColumns] += left (16 rows of D) times the rows of a tile [kColumns][D], transposed.
template <class Element, class Tile, int kColumns, bool kInRegisters>
__device__ inline void multiply_rows(float (&acc)[kColumns / 8][4],
                                     const LeftRows<Tile, kInRegisters>& left, uint32_t tile,
                                     const LaneOffsets<Tile>& lane) {
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    uint32_t a[4];
    left.at(step, a);
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, tile + (lane.columns ^ (step * 32)) + pair * 16 * Tile::kRowBytes);
      mma16<Element>(acc[2 * pair], a, b[0], b[1]);
      mma16<Element>(acc[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// acc [16, D] += weights [16, kColumns], rounded to Element, times a tile [kColumns][D].
template <class Element, class Tile, int kColumns>
__device__ inline void multiply_weights(float (&acc)[Tile::kHead / 8][4],
                                        const float (&weights)[kColumns / 8][4], uint32_t tile,
                                        const LaneOffsets<Tile>& lane) {
  using Traits = ElementTraits<Element>;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    const float (&left)[4] = weights[2 * k];
    const float (&right)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {Traits::pack(left[0], left[1]), Traits::pack(left[2], left[3]),
                           Traits::pack(right[0], right[1]), Traits::pack(right[2], right[3])};
#pragma unroll
    for (int pair = 0; pair < Tile::kSteps; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, tile + (lane.rows ^ (pair * 32)) + k * 16 * Tile::kRowBytes);
      mma16<Element>(acc[2 * pair], a, b[0], b[1]);
      mma16<Element>(acc[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// Rounds a warp's 16 rows into a tile of its own.
template <class Element, class Tile>
__device__ inline void round_rows(unsigned char* tile, const float (&acc)[Tile::kHead / 8][4],
                                  float upper, float lower, int lane) {
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
