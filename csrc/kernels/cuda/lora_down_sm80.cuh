// lora_down: s = scaling drop(x) lora_a^T, one pass over x; beside it, copies of a low-rank factor
// for the GEMM's second source.
#pragma once

#include "kernels/cuda/skinny_sm80.cuh"
#include "kernels/ptx/grid_dependency.cuh"

namespace fused_peft::cuda {

// Float32 factors enter the 16-bit GEMM as sums of two elements each: s lora_b^T = s_hi b_hi + s_hi
// b_lo + s_lo b_hi, three segments of the reduction; what is left out is below the rounding of the
// output. Segment of a column, and which part it takes.
constexpr int kSegments = 3;
__host__ __device__ constexpr int64_t segment_columns(int64_t r) {
  return (r + kChunk - 1) / kChunk * kChunk;
}

template <class Element>
__device__ inline Element high_part(float v) {
  return ElementTraits<Element>::from_float(v);
}
template <class Element>
__device__ inline Element low_part(float v) {
  using Traits = ElementTraits<Element>;
  return Traits::from_float(v - Traits::to_float(Traits::from_float(v)));
}

// A factor's copy as an operand of the GEMM: padded, aligned, in segments, in the majorness that
// the GEMM needs.
struct FactorCopy {
  const void* source = nullptr;  // null: no copy
  bool source_float = false;
  int64_t outer = 0, reduced = 0;  // extents: N and R of lora_b, K and R of lora_a
  int64_t outer_stride = 0, reduced_stride = 0;
  void* target = nullptr;
  int64_t target_stride = 0;  // of a row of the target, elements
  bool k_major = true;        // target [outer, columns], else [columns, outer]
  int segments = 1;
};

template <class Element>
__device__ void copy_factor(const FactorCopy& copy, int64_t thread, int64_t threads) {
  const int64_t columns = segment_columns(copy.reduced) * copy.segments;
  const int64_t rows = copy.k_major ? copy.outer : copy.target_stride;
  for (int64_t i = thread; i < rows * columns; i += threads) {
    const int64_t outer = copy.k_major ? i / columns : i % rows,
                  column = copy.k_major ? i % columns : i / rows;
    const int64_t segment = column / segment_columns(copy.reduced),
                  r = column % segment_columns(copy.reduced);
    Element value = ElementTraits<Element>::from_float(0.f);
    if (r < copy.reduced && outer < copy.outer) {
      const int64_t at = outer * copy.outer_stride + r * copy.reduced_stride;
      if (copy.source_float) {
        const float v = static_cast<const float*>(copy.source)[at];
        value = segment == 1 ? low_part<Element>(v) : high_part<Element>(v);
      } else {
        value = static_cast<const Element*>(copy.source)[at];
      }
    }
    static_cast<Element*>(copy.target)[copy.k_major ? outer * copy.target_stride + column
                                                    : column * copy.target_stride + outer] = value;
  }
}

// The low-rank operand of the GEMM: row m holds s in segments (high, high, low).
struct TermsOut {
  void* data = nullptr;  // [M, segment_columns(r) * segments]; null: not needed
  int64_t stride = 0;
  int segments = 1;
};

template <class Element>
__device__ inline void store_terms(const TermsOut& out, int64_t m, int64_t r, int64_t column,
                                   float s) {
  if (!out.data) return;
  Element* row = static_cast<Element*>(out.data) + m * out.stride;
  const int64_t segment = segment_columns(r);
  row[column] = high_part<Element>(column < r ? s : 0.f);
  if (out.segments == kSegments) {
    row[segment + column] = high_part<Element>(column < r ? s : 0.f);
    row[2 * segment + column] = low_part<Element>(column < r ? s : 0.f);
  }
}

// Four columns of it.
template <class Element>
__device__ inline void store_terms_quad(const TermsOut& out, int64_t m, int64_t r, int64_t column,
                                        float4 s) {
  if (!out.data) return;
  using Traits = ElementTraits<Element>;
  if (column >= r) s.x = 0.f;
  if (column + 1 >= r) s.y = 0.f;
  if (column + 2 >= r) s.z = 0.f;
  if (column + 3 >= r) s.w = 0.f;
  Element* const row = static_cast<Element*>(out.data) + m * out.stride + column;
  const int64_t segment = segment_columns(r);
  store_quad(row, s);
  if (out.segments == kSegments) {
    const auto low = [](float v) { return v - Traits::to_float(Traits::from_float(v)); };
    store_quad(row + segment, s);
    store_quad(row + 2 * segment, {low(s.x), low(s.y), low(s.z), low(s.w)});
  }
}

struct LoraDownParams {
  int64_t k = 0;
  SkinnyRows x, lora_a;
  double scaling = 0.0;  // 1 / (1 - p) included
  Dropout dropout;
  float* s = nullptr;  // [M, R]
  TermsOut terms;
  FactorCopy copy;
  int row_blocks = 0;  // CTAs beyond these copy the factor
};

template <class Element, class Factor, int kRank>
__global__ void __launch_bounds__(kSkinnyThreads) lora_down_kernel(const LoraDownParams p) {
  __shared__ float sums[kSkinnyWarps * kSkinnyRows * sum_row(kRank)];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (static_cast<int>(blockIdx.x) >= p.row_blocks) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) - p.row_blocks;
    copy_factor<Element>(p.copy, first * kSkinnyThreads + threadIdx.x,
                         (static_cast<int64_t>(gridDim.x) - p.row_blocks) * kSkinnyThreads);
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSkinnyRows;
  const uint64_t seed = p.dropout.seed ? *p.dropout.seed : 0;
  float acc[kRank / 8][4] = {};
  int64_t k = warp * kSkinnyStep + lane % 4 * kChunk;
  RowPair<Element> next;
  next.load(p.x, row0, k, p.k, lane);
#pragma unroll 1
  for (; k - lane % 4 * kChunk < p.k; k += kSkinnyWarps * kSkinnyStep) {
    RowPair<Element> x = next;
    next.load(p.x, row0, k + kSkinnyWarps * kSkinnyStep, p.k, lane);
    if (p.dropout.seed) x.mask(seed, p.dropout.threshold, row0, k, p.k, lane);
    multiply_rows<Element, Factor>(acc, x, p.lora_a, 0, k, p.k, lane);
  }
  const int64_t r = p.lora_a.rows;
  add_warps(acc, sums, static_cast<int>(segment_columns(r)), [&](int row, int column, float sum) {
    const int64_t m = row0 + row;
    if (m >= p.x.rows) return;
    if (column < r) p.s[m * r + column] = scaled(sum, p.scaling);
    store_terms<Element>(p.terms, m, r, column, scaled(sum, p.scaling));
  });
}

}  // namespace fused_peft::cuda
