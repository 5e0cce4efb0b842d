// Products with few columns, straight from global memory to the tensor cores: s = x lora_a^T and
// the decode layer.
//
// Each lane loads 16 bytes of a row, so a warp's load covers 8 rows of 64 bytes, whole sectors. The
// eight elements go to two m16n8k16 as if they were k = 2t, 2t + 1, 2t + 8, 2t + 9 of each: both
// operands permute k alike, and a sum has no order. No shared memory is needed until the warps,
// which split k, add up their sums in a fixed order.
#pragma once

#include <cstdint>

#include "kernels/cuda/philox.cuh"
#include "kernels/cuda/tile.cuh"
#include "kernels/ptx/store.cuh"

namespace fused_peft::cuda {

constexpr int kSkinnyRows = 16;  // rows of x per CTA
constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyThreads = 32 * kSkinnyWarps;
constexpr int kSkinnyStep = 32;  // k of one warp's step

struct SkinnyRows {
  const void* data = nullptr;  // [rows, k], rows contiguous
  int64_t stride = 0;
  int64_t rows = 0;
  bool aligned = false;
};

// Elements 8t.. of rows g and g + 8 of the 16 rows from row0, as two A fragments: {r0.x, r1.x,
// r0.y, r1.y} and {.z, .z, .w, .w}.
template <class Element>
struct RowPair {
  uint4 upper, lower;

  __device__ void load(const SkinnyRows& x, int64_t row0, int64_t k, int64_t k_end, int lane) {
    const int64_t row = row0 + lane / 4;
    const auto* base = static_cast<const Element*>(x.data) + k;
    upper = load_chunk(base + row * x.stride, row < x.rows ? k_end - k : 0, x.aligned);
    lower = load_chunk(base + (row + 8) * x.stride, row + 8 < x.rows ? k_end - k : 0, x.aligned);
  }
  // Zeroes the elements that dropout drops; element (row, k) has index row * columns + k.
  __device__ void mask(uint64_t seed, uint32_t threshold, int64_t row0, int64_t k, int64_t columns,
                       int lane) {
    const int64_t row = row0 + lane / 4;
    upper =
        masked(upper, keep_bits<kChunk>(seed, threshold, static_cast<uint64_t>(row * columns + k)));
    lower = masked(
        lower, keep_bits<kChunk>(seed, threshold, static_cast<uint64_t>((row + 8) * columns + k)));
  }
  __device__ static uint4 masked(uint4 v, uint32_t keep) {
    uint32_t* words = &v.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(keep >> (2 * i) & 1)) words[i] &= 0xffff0000u;
      if (!(keep >> (2 * i + 1) & 1)) words[i] &= 0x0000ffffu;
    }
    return v;
  }
};

// The product with a factor that float would round: that one rounding would be in every element.
__device__ inline float scaled(float sum, double scaling) {
  return static_cast<float>(sum * scaling);
}

// acc[j] += x's 16 rows times rows 8j .. 8j + 7 of `other`, over this warp's eight elements per
// lane at k.
template <class Element, class Other, int kBlocks>
__device__ inline void multiply_rows(float (&acc)[kBlocks][4], const RowPair<Element>& x,
                                     const SkinnyRows& other, int64_t row0, int64_t k,
                                     int64_t k_end, int lane) {
  const uint32_t first[4] = {x.upper.x, x.lower.x, x.upper.y, x.lower.y};
  const uint32_t second[4] = {x.upper.z, x.lower.z, x.upper.w, x.lower.w};
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (row0 + j * 8 >= other.rows) break;
    const int64_t row = row0 + j * 8 + lane / 4;
    const auto* pointer = static_cast<const Other*>(other.data) + row * other.stride + k;
    const int64_t valid = row < other.rows ? k_end - k : 0;
    if constexpr (sizeof(Other) == 2) {
      const uint4 b = load_chunk(pointer, valid, other.aligned);
      mma16<Element>(acc[j], first, b.x, b.y);
      mma16<Element>(acc[j], second, b.z, b.w);
    } else {
      float b[kChunk];
      if (other.aligned && valid >= kChunk) {
        reinterpret_cast<float4*>(b)[0] = __ldg(reinterpret_cast<const float4*>(pointer));
        reinterpret_cast<float4*>(b)[1] = __ldg(reinterpret_cast<const float4*>(pointer) + 1);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) b[i] = i < valid ? __ldg(pointer + i) : 0.f;
      }
      mma16_float_b<Element>(acc[j], first, FloatTerms({b[0], b[1]}, {b[2], b[3]}));
      mma16_float_b<Element>(acc[j], second, FloatTerms({b[4], b[5]}, {b[6], b[7]}));
    }
  }
}

// Floats of a row of partial sums of so many columns: 8 modulo 32, so that the pairs which a half
// warp stores lie in different banks.
__host__ __device__ constexpr int sum_row(int columns) { return (columns < 64 ? columns : 64) + 8; }

// The i-th of the rows that lie sum_row(16) floats apart, in an order in which two after one
// another have no bank in common: a warp reads two rows of 16 columns at a time.
__device__ inline int paired_row(int i) { return (i & ~3) | (i & 1) << 1 | (i >> 1 & 1); }

// Adds up the warps' accumulators in the order of the warps, 64 columns at a time through `shared`
// (kSkinnyWarps * 16 * sum_row(columns) floats), and calls use(row, column, sum) for each of the 16
// x (8 kBlocks).
template <int kBlocks, class Use>
__device__ inline void add_warps(const float (&acc)[kBlocks][4], float* shared, int columns,
                                 Use use) {
  constexpr int kWidth = kBlocks * 8 < 64 ? kBlocks * 8 : 64;
  constexpr int kRow = sum_row(kBlocks * 8);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int base = 0; base < kBlocks * 8; base += kWidth) {
    if (base >= columns) break;
    float* own = shared + warp * kSkinnyRows * kRow;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_shared_v2(
            ptx::shared_address(own + (lane / 4 + half * 8) * kRow + j * 8 + lane % 4 * 2),
            acc[base / 8 + j][2 * half], acc[base / 8 + j][2 * half + 1]);
    __syncthreads();
    for (int i = threadIdx.x; i < kSkinnyRows * kWidth; i += kSkinnyThreads) {
      const int row = kWidth == 16 ? paired_row(i / kWidth) : i / kWidth;
      const int at = row * kRow + i % kWidth;
      float sum = shared[at];
#pragma unroll
      for (int w = 1; w < kSkinnyWarps; ++w) sum += shared[w * kSkinnyRows * kRow + at];
      if (base + i % kWidth < columns) use(row, base + i % kWidth, sum);
    }
    __syncthreads();
  }
}

}  // namespace fused_peft::cuda
