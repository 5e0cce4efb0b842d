// Few rows (M <= kDecodeRows): the weight is all the traffic. Dot products along k read each weight
// row once, straight from where it lies; the low-rank tail joins the same accumulators.
#include "kernels/cpu/gemm_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

constexpr int kDotCols = 4;
constexpr int kDotRows = kAccumulators / kDotCols;

struct DotFloat {
  static constexpr int kStep = kLanes;
  template <class T>
  static Vec load_full(const T* p) {
    return load(p);
  }
  template <class T>
  static Vec load_some(const T* p, int64_t count) {
    return load_partial(p, count);
  }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
};

#if FUSED_PEFT_BF16_DOT
struct DotBf16 {
  static constexpr int kStep = 2 * kLanes;
  static Vec load_full(const BFloat16* p) { return load_bits<Vec>(p); }
  static Vec load_some(const BFloat16* p, int64_t count) { return load_pairs_partial(p, count); }
  static Vec fma(Vec a, Vec b, Vec c) { return MultiplyBf16Pairs::fma(a, b, c); }
};
#endif

// Lane sums of four vectors, into four consecutive floats.
inline void sum_lanes(const Vec (&acc)[kDotCols], float* out) {
  constexpr int kHalf = kLanes / 2;
  const Vec even = zip<0>(acc[0], acc[2]) + zip<kHalf>(acc[0], acc[2]);
  const Vec odd = zip<0>(acc[1], acc[3]) + zip<kHalf>(acc[1], acc[3]);
  const Vec all = zip<0>(even, odd) + zip<kHalf>(even, odd);
  float sums[kDotCols];
  std::memcpy(sums, &all, sizeof(sums));
  for (int group = kDotCols; group < kLanes; group += kDotCols)
    for (int i = 0; i < kDotCols; ++i) sums[i] += all[group + i];
  std::memcpy(out, sums, sizeof(sums));
}

// acc[kRows][kDotCols] += rows of x times rows of w, both along k. Missing columns repeat the last.
template <class Dot, int kRows, class X, class W>
inline void dot_accumulate(const X* x, int64_t ldx, const W* const (&w)[kDotCols], int64_t k_size,
                           int64_t prefetch_bytes, Vec (&acc)[kRows][kDotCols]) {
  int64_t k = 0;
  for (; k + Dot::kStep <= k_size; k += Dot::kStep) {
    Vec column[kDotCols];
#pragma GCC unroll 4
    for (int j = 0; j < kDotCols; ++j) {
      column[j] = Dot::load_full(w[j] + k);
      if (prefetch_bytes)
        __builtin_prefetch(reinterpret_cast<const char*>(w[j] + k) + prefetch_bytes);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec row = Dot::load_full(x + i * ldx + k);
#pragma GCC unroll 4
      for (int j = 0; j < kDotCols; ++j) acc[i][j] = Dot::fma(row, column[j], acc[i][j]);
    }
  }
  if (k == k_size) return;
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const Vec row = Dot::load_some(x + i * ldx + k, k_size - k);
#pragma GCC unroll 4
    for (int j = 0; j < kDotCols; ++j)
      acc[i][j] = Dot::fma(row, Dot::load_some(w[j] + k, k_size - k), acc[i][j]);
  }
}

template <class Dot, int kRows, class X, class W>
void dot_tile(const Decode& d, int64_t m0, int64_t n0, int64_t cols, float* c, int64_t ldc) {
  Vec acc[kRows][kDotCols];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kDotCols; ++j) acc[i][j] = Vec{};
  const auto column = [&](int j) { return n0 + (j < cols ? j : cols - 1); };
  const W* w[kDotCols];
  for (int j = 0; j < kDotCols; ++j)
    w[j] = static_cast<const W*>(d.weight.data) + column(j) * d.weight.row_stride;
  // The first rows of x pull in the weight rows of the next column group.
  const bool more = m0 == 0 && n0 + 2 * kDotCols <= d.n;
  dot_accumulate<Dot, kRows>(static_cast<const X*>(d.x.data) + m0 * d.x.row_stride, d.x.row_stride,
                             w, d.k, more ? kDotCols * d.weight.row_stride * int64_t{sizeof(W)} : 0,
                             acc);
  if (d.s) {
    // A sum of its own, for the reason given at kChunkSteps.
    Vec base[kRows][kDotCols];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kDotCols; ++j) base[i][j] = acc[i][j], acc[i][j] = Vec{};
    with_dtype(d.lora_b.dtype, [&](auto* type) {
      using B = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      const B* b[kDotCols];
      for (int j = 0; j < kDotCols; ++j)
        b[j] = static_cast<const B*>(d.lora_b.data) + column(j) * d.lora_b.row_stride;
      dot_accumulate<DotFloat, kRows>(d.s + m0 * d.r, d.r, b, d.r, 0, acc);
    });
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kDotCols; ++j) acc[i][j] += base[i][j];
  }
  for (int i = 0; i < kRows; ++i) sum_lanes(acc[i], c + i * ldc);
}

template <class Dot, class X, class W, int kRows = kDotRows>
void dot_rows(const Decode& d, int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* c,
              int64_t ldc) {
  if (rows >= kRows) return dot_tile<Dot, kRows, X, W>(d, m0, n0, cols, c, ldc);
  if constexpr (kRows > 1) dot_rows<Dot, X, W, kRows - 1>(d, m0, rows, n0, cols, c, ldc);
}

// Rows of x in near-equal tiles: 16 rows as 6 + 5 + 5, never 6 + 6 + 4.
template <class Dot, class X, class W>
void decode_columns(const Decode& d, int64_t n0, int64_t n1) {
  const int64_t tiles = (d.m + kDotRows - 1) / kDotRows;
  float c[kDecodeRows * kLanes];
  float bias[kLanes];
  for (int64_t n = n0; n < n1; n += kLanes) {
    const int64_t end = n1 - n < kLanes ? n1 : n + kLanes;
    for (int64_t group = n; group < end; group += kDotCols) {
      const int64_t cols = end - group < kDotCols ? end - group : kDotCols;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m0 = d.m * tile / tiles;
        const int64_t rows = d.m * (tile + 1) / tiles - m0;
        dot_rows<Dot, X, W>(d, m0, rows, group, cols, c + m0 * kLanes + (group - n), kLanes);
      }
    }
    load_bias(d.epilogue.bias, n, end - n, bias);
    write_tile(d.epilogue, c, kLanes, bias, 0, d.m, n, end - n);
  }
}

inline void decode_block(const Decode& d, int64_t n0, int64_t n1) {
#if FUSED_PEFT_BF16_DOT
  if (d.x.dtype == DType::kBFloat16) return decode_columns<DotBf16, BFloat16, BFloat16>(d, n0, n1);
#endif
  with_dtype(d.weight.dtype, [&](auto* type) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    decode_columns<DotFloat, float, W>(d, n0, n1);
  });
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
