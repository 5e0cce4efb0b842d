// What both passes of prefix attention are made of: the register tile, 2^x, rows of the prefix and
// the sequence as one list of keys, and the span of keys that a query sees.
#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/decode_impl.h"
#include "kernels/cpu/philox_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

// 6 rows of 4 vectors (2 with 16 registers): 24 (12) accumulators, and a row of B is read once for
// 6 rows of A. A head of 64 then is one column panel of an AVX-512 tile.
constexpr int kAttnRows = 6;
constexpr int kAttnVecs = FUSED_PEFT_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kAttnCols = kAttnVecs * kLanes;

constexpr double kLog2 = 0.6931471805599453;  // natural log of 2
constexpr float kMinusInfinity = -__builtin_inff();

// Not std::min and std::max: kernel_table.h says why.
constexpr int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// How operands are multiplied: bfloat16 pairs or floats, a step being 4 bytes of a row either way.
struct FloatOperand {
  using Element = float;
  using Multiply = MultiplyFloat;
  static constexpr int kStep = 1;
  static constexpr int kExpDegree = 6;
};

#if FUSED_PEFT_BF16_DOT
struct PairOperand {
  using Element = BFloat16;
  using Multiply = MultiplyBf16Pairs;
  static constexpr int kStep = 2;
  static constexpr int kExpDegree = 4;  // 3e-6: the weights are rounded to 8 bits
};
#endif

// ---- the register tile -------------------------------------------------------------------------

// C[rows, vecs * kLanes] = A B, or C = alpha * C + A B where accumulate, alpha null for 1.
struct AttnTile {
  const char* a;  // rows lda bytes apart, 4 bytes a step
  int64_t lda;
  const float* b;  // rows (steps) ldb floats apart
  int64_t ldb;
  int64_t steps;
  float* c;  // rows ldc floats apart
  int64_t ldc;
  const float* alpha;  // [rows]
  bool accumulate;
};

template <class Operand, int kRows, int kVecs>
void attention_tile(const AttnTile& t) {
  Vec acc[kRows][kVecs];
  clear(acc);
  const char* a = t.a;
  DirectColumns<float> columns{t.b, t.ldb};
  if constexpr (std::is_same_v<Operand, FloatOperand>) {
    Vec sum[kRows][kVecs];  // short sums, for the reason given at kChunkSteps
    clear(sum);
    for (int64_t left = t.steps; left > 0; left -= kChunkSteps) {
      clear(acc);
      multiply_steps<MultiplyFloat>(a, t.lda, columns, left < kChunkSteps ? left : kChunkSteps,
                                    acc);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVecs; ++j) sum[i][j] += acc[i][j];
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) acc[i][j] = sum[i][j];
  } else {
    multiply_steps<typename Operand::Multiply>(a, t.lda, columns, t.steps, acc);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const Vec alpha = broadcast(t.alpha ? t.alpha[i] : 1.0F);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* to = t.c + i * t.ldc + j * kLanes;
      store(to, t.accumulate ? alpha * load(to) + acc[i][j] : acc[i][j]);
    }
  }
}

using AttnTileFn = void (*)(const AttnTile& tile);

template <class Operand, int kRows = 1, int kVecs = 1>
inline void run_tile(const AttnTile& tile, int rows, int vecs) {
  if constexpr (kRows < kAttnRows) {
    if (rows > kRows) return run_tile<Operand, kRows + 1, kVecs>(tile, rows, vecs);
  }
  if constexpr (kVecs < kAttnVecs) {
    if (vecs > kVecs) return run_tile<Operand, kRows, kVecs + 1>(tile, rows, vecs);
  }
  attention_tile<Operand, kRows, kVecs>(tile);
}

// ---- functions of vectors ----------------------------------------------------------------------

// max(a, b), b where either is NaN.
inline Vec vec_max(Vec a, Vec b) {
#if FUSED_PEFT_VECTOR_BYTES == 64  // maskz: GCC 12 warns of _mm512_max_ps's own header
  return reinterpret_cast<Vec>(
      _mm512_maskz_max_ps(0xFFFF, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif FUSED_PEFT_VECTOR_BYTES == 32
  return reinterpret_cast<Vec>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 127 by x = n + f, |f| <= 1/2, and a minimax polynomial in f: relative error 1e-7 at
// degree 6, 3e-6 at degree 4. 0 below -126, NaN for NaN.
template <int kDegree>
inline Vec exp2_vec(Vec x) {
  const Vec magic = broadcast(12582912.0F);  // 1.5 * 2^23: n lands in the low bits
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p;
  if constexpr (kDegree == 4) {
    p = f * 0.009570101276040077F + 0.05591785907745361F;
    p = p * f + 0.240247443318367F;
    p = p * f + 0.6931217908859253F;
    p = p * f + 0.9999992847442627F;
  } else {
    p = f * 0.00015345810970757157F + 0.0013399930903688073F;
    p = p * f + 0.009618489071726799F;
    p = p * f + 0.05550328642129898F;
    p = p * f + 0.24022646248340607F;
    p = p * f + 0.6931471824645996F;
    p = p * f + 1.0F;
  }
  const VecU bits = reinterpret_cast<VecU>(p) + (reinterpret_cast<VecU>(shifted) << 23);
  const VecI underflow = x < -126.0F;
  return reinterpret_cast<Vec>(reinterpret_cast<VecI>(bits) & ~underflow);
}

inline Vec select(VecI mask, Vec a, Vec b) {
  return reinterpret_cast<Vec>((reinterpret_cast<VecI>(a) & mask) |
                               (reinterpret_cast<VecI>(b) & ~mask));
}

// log2 of positive normal numbers, NaN for NaN: x = 2^n c with c in [1/sqrt 2, sqrt 2), and the
// series of log((1 + y) / (1 - y)) at y = (c - 1) / (c + 1), whose first term left out is 3e-10.
inline Vec log2_vec(Vec x) {
  constexpr uint32_t kHalfRoot = 0x3F3504F3U;  // 1/sqrt 2
  const VecU bits = reinterpret_cast<VecU>(x) - kHalfRoot;
  const Vec n = __builtin_convertvector(reinterpret_cast<VecI>(bits) >> 23, Vec);
  const Vec c = reinterpret_cast<Vec>((bits & 0x007FFFFFU) + kHalfRoot);
  const Vec y = (c - 1.0F) / (c + 1.0F);
  const Vec y2 = y * y;
  Vec series = y2 * (1.0F / 9.0F) + 1.0F / 7.0F;
  series = series * y2 + 1.0F / 5.0F;
  series = series * y2 + 1.0F / 3.0F;
  series = series * y2 + 1.0F;
  const Vec log2 = y * series * 2.885390081777927F + n;
  return select(x == x, log2, x);
}

template <class Fn>
inline float fold_lanes(Vec v, const Fn& fn) {
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
#if defined(__clang__)
    Vec other = v;
    for (int i = 0; i < width; ++i) other[i] = v[i + width];
#else
    VecI indices;
    for (int i = 0; i < kLanes; ++i) indices[i] = (i + width) % kLanes;
    const Vec other = __builtin_shuffle(v, indices);
#endif
    v = fn(v, other);
  }
  return v[0];
}

inline VecI lane_indices() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---- the keys of a task ------------------------------------------------------------------------

// Keys that at least one of a task's queries sees, as one list: the prefix, then sequence keys from
// first on. u is a place in it.
struct KeyList {
  int64_t prefix = 0;
  int64_t first = 0;  // sequence key at u = prefix
  int64_t count = 0;  // of the list
};

// Sequence keys [lo, hi) in reach of a query, before key_mask's holes.
struct KeyRange {
  int64_t lo, hi;
};

// What key_lengths and key_mask leave of a batch row's keys.
struct BatchKeys {
  KeyRange range;
  const uint8_t* mask;  // [T], null where every key of the range is seen
};

inline BatchKeys batch_keys(const PrefixAttentionParams& p, int64_t b) {
  BatchKeys keys{{0, p.keys}, nullptr};
  if (p.key_lengths) keys.range.hi = larger(0, smaller(p.keys, p.key_lengths[b]));
  if (!p.key_mask) return keys;
  const uint8_t* mask = p.key_mask + b * p.key_mask_stride;
  auto& [lo, hi] = keys.range;
  while (lo < hi && !mask[lo]) ++lo;
  while (hi > lo && !mask[hi - 1]) --hi;
  for (int64_t t = lo; t < hi; ++t)
    if (!mask[t]) keys.mask = mask;
  return keys;
}

inline int64_t first_position(const PrefixAttentionParams& p, int64_t b) {
  return p.query_start ? p.query_start[b * p.query_start_stride] : p.keys - p.queries;
}

inline KeyRange keys_of_query(const PrefixAttentionParams& p, const KeyRange& batch,
                              int64_t position) {
  KeyRange range = batch;
  if (p.causal) range.hi = smaller(range.hi, position + 1);
  if (p.window > 0) {
    range.lo = larger(range.lo, position - p.window + 1);
    range.hi = smaller(range.hi, position + p.window);
  }
  return range;
}

// The list for queries at [position, position + queries).
inline KeyList key_list(const PrefixAttentionParams& p, const KeyRange& batch, int64_t position,
                        int64_t queries) {
  const int64_t lo = smaller(batch.hi, keys_of_query(p, batch, position).lo);
  const int64_t hi = keys_of_query(p, batch, position + queries - 1).hi;
  return {p.prefix, lo, p.prefix + larger(0, hi - lo)};
}

// Rows [u, u + count) of the list in prefix or sequence, one head: in place where they lie in one
// of the two, else copied to staged, [count, D].
struct RowsOfKeys {
  const char* data;
  int64_t stride;  // elements
};

inline RowsOfKeys rows_of_keys(const KeyList& list, const HeadsView& prefix,
                               const HeadsView& sequence, int64_t b, int64_t h, int64_t u,
                               int64_t count, int64_t head_dim, int64_t size, char* staged) {
  const auto row = [&](int64_t place) {
    const bool in_prefix = place < list.prefix;
    const HeadsView& v = in_prefix ? prefix : sequence;
    const int64_t i = in_prefix ? place : place - list.prefix + list.first;
    return static_cast<const char*>(v.data) +
           (b * v.batch_stride + h * v.head_stride + i * v.row_stride) * size;
  };
  if (u + count <= list.prefix) return {row(u), prefix.row_stride};
  if (u >= list.prefix) return {row(u), sequence.row_stride};
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(staged + i * head_dim * size, row(u + i), static_cast<size_t>(head_dim * size));
  return {staged, head_dim};
}

// ---- dropout -----------------------------------------------------------------------------------

struct QueryIndex {
  int64_t batch, head, query;
};

// Bits of places [u, u + columns) of the list that dropout keeps for a query, 1 = kept. Element
// (b, h, s, j) of [B, Hq, S, P + T] is the mask's element of that index.
inline void dropout_columns(const PrefixAttentionParams& p, uint32_t threshold, const KeyList& list,
                            const QueryIndex& q, int64_t u, int64_t columns, uint64_t* bits) {
  const auto width = static_cast<uint64_t>(p.prefix + p.keys);
  const auto row =
      static_cast<uint64_t>((q.batch * p.q_heads + q.head) * p.queries + q.query) * width;
  const int64_t in_prefix = list.first == 0 ? 0 : smaller(columns, larger(0, list.prefix - u));
  if (in_prefix == 0) {
    const int64_t j = u < list.prefix ? u : u + list.first;
    return dropout_row(p.seed, threshold, row + static_cast<uint64_t>(j), columns, bits);
  }
  dropout_row(p.seed, threshold, row + static_cast<uint64_t>(u), in_prefix, bits);
  uint64_t word = 0;
  for (int64_t c = in_prefix; c < columns; ++c) {
    if (c == in_prefix || (c - in_prefix) % 64 == 0)
      dropout_row(p.seed, threshold, row + static_cast<uint64_t>(u + c + list.first), 64, &word);
    const uint64_t bit = uint64_t{1} << (c % 64);
    if (c % 64 == 0) bits[c / 64] = 0;
    const bool kept = word >> ((c - in_prefix) % 64) & 1U;
    bits[c / 64] = kept ? bits[c / 64] | bit : bits[c / 64] & ~bit;
  }
}

// ---- operands ----------------------------------------------------------------------------------

// A row as the tile reads it: bfloat16 pairs as they are, everything else as floats.
template <class Operand>
inline void stage_row(const char* row, DType dtype, int64_t size, typename Operand::Element* out) {
  if constexpr (Operand::kStep == 2) {
    std::memcpy(out, row, static_cast<size_t>(size) * 2);
  } else {
    with_dtype(dtype, [&](auto* type) {
      const auto* p = reinterpret_cast<decltype(type)>(row);
      for (int64_t d = 0; d < size; d += kLanes)
        store_partial(out + d, load_partial(p + d, size - d), size - d);
    });
  }
}

// Rows as the columns of B: [D steps, kAttnCols], lane n being row n.
template <class Operand>
inline void pack_as_columns(const RowsOfKeys& rows, DType dtype, int64_t count, int64_t head_dim,
                            float* out) {
#if FUSED_PEFT_BF16_DOT
  if constexpr (Operand::kStep == 2)
    return pack_columns_pairs(reinterpret_cast<const BFloat16*>(rows.data), rows.stride, head_dim,
                              count, kAttnVecs, out);
#endif
  with_dtype(dtype, [&](auto* type) {
    pack_columns_float(reinterpret_cast<decltype(type)>(rows.data), rows.stride, head_dim, count,
                       kAttnVecs, out);
  });
}

// Columns [column, column + cols) of rows as rows of B: [row steps, vecs * kLanes].
template <class Operand>
inline void pack_as_rows(const RowsOfKeys& rows, DType dtype, int64_t count, int64_t column,
                         int64_t cols, int vecs, float* out) {
#if FUSED_PEFT_BF16_DOT
  if constexpr (Operand::kStep == 2)
    return pack_rows_pairs(reinterpret_cast<const BFloat16*>(rows.data) + column, rows.stride,
                           count, cols, vecs, out);
#endif
  with_dtype(dtype, [&](auto* type) {
    pack_rows_float(reinterpret_cast<decltype(type)>(rows.data) + column, rows.stride, count, cols,
                    vecs, nullptr, 0, 0, out);
  });
}

// A head's columns in panels of equal width: 80 is 48 + 32, not 64 + 16, whose narrow tile would
// wait for its own sums.
struct HeadPanels {
  int64_t head_dim;
  int count, vecs;

  explicit HeadPanels(int64_t head_dim_) : head_dim(head_dim_) {
    const auto all = static_cast<int>((head_dim + kLanes - 1) / kLanes);
    count = (all + kAttnVecs - 1) / kAttnVecs;
    vecs = (all + count - 1) / count;
    count = (all + vecs - 1) / vecs;
  }
  int64_t first(int panel) const { return int64_t{panel} * vecs * kLanes; }
  int vecs_of(int panel) const {
    return static_cast<int>(smaller(vecs, (head_dim - first(panel) + kLanes - 1) / kLanes));
  }
  int64_t padded() const { return int64_t{count} * vecs * kLanes; }
};

// Hands out aligned pieces of a scratch block; with a null block it only counts.
class ScratchPieces {
 public:
  explicit ScratchPieces(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <class Fn>
inline auto with_operand([[maybe_unused]] const PrefixAttentionParams& p, const Fn& fn) {
#if FUSED_PEFT_BF16_DOT
  if (p.dtype == DType::kBFloat16 && p.head_dim % 2 == 0) return fn(PairOperand{});
#endif
  return fn(FloatOperand{});
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
