// The two skinny passes of the backward pass.
//
//   over dy:  ds = scaling / (1 - p) dy lora_b,  dlora_b = dy^T s      one read of dy
//   over x:   dlora_a = ds^T (keep x)                                  one read of x
//
// Both contract a 16-bit matrix, transposed by ldmatrix, with a narrow one. Sums across warps and
// CTAs are float32 and in a fixed order: no atomics, the same bits in every run.
#pragma once

#include "kernels/cuda/lora_down_sm80.cuh"
#include "kernels/cuda/philox.cuh"
#include "kernels/cuda/tile.cuh"
#include "kernels/ptx/grid_dependency.cuh"

namespace fused_peft::cuda {

constexpr int kPanel = 32;  // columns of dy or x that one warp holds at a time

// A narrow operand, [k rows][kRank columns], in shared memory: 16-bit and swizzled for ldmatrix, or
// float32 in padded rows.
template <class Factor, int kRank>
struct NarrowTile {
  static constexpr bool kFloat = sizeof(Factor) == 4;
  static constexpr int kRowFloats =
      kRank + 4;  // 4 modulo 32: rows 2t and columns g of a fragment lie in 32 banks
  static constexpr int bytes(int rows) { return kFloat ? rows * kRowFloats * 4 : rows * kRank * 2; }
};

// Fills rows [0, rows) of a narrow tile by one warp; rows beyond `valid_rows` and columns beyond r
// are zero.
template <class Factor, int kRank>
__device__ inline void fill_narrow(unsigned char* tile, const void* data, int64_t stride,
                                   int64_t first_row, int64_t valid_rows, int r, bool aligned,
                                   int rows, int thread, int threads) {
  const uint32_t shared = ptx::shared_address(tile);
  if constexpr (NarrowTile<Factor, kRank>::kFloat) {
    for (int i = thread; i < rows * (kRank / 4); i += threads) {
      const int row = i / (kRank / 4), column = i % (kRank / 4) * 4;
      const auto* from = static_cast<const float*>(data) + (first_row + row) * stride + column;
      float v[4];
      if (aligned && row < valid_rows && column + 4 <= r) {
        *reinterpret_cast<float4*>(v) = __ldg(reinterpret_cast<const float4*>(from));
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          v[e] = row < valid_rows && column + e < r ? __ldg(from + e) : 0.f;
      }
      *reinterpret_cast<float4*>(tile + (row * NarrowTile<Factor, kRank>::kRowFloats + column) *
                                            4) = make_float4(v[0], v[1], v[2], v[3]);
    }
  } else {
    for (int i = thread; i < rows * (kRank / kChunk); i += threads) {
      const int row = i / (kRank / kChunk), chunk = i % (kRank / kChunk);
      const auto* from =
          static_cast<const Factor*>(data) + (first_row + row) * stride + chunk * kChunk;
      fill_chunk(shared + tile_offset<kRank>(row, chunk), from,
                 row < valid_rows ? r - chunk * kChunk : 0, aligned);
    }
  }
}

// acc[j] += a (16 x 16 fragment) times rows k .. k + 15, columns 8 j .. of a narrow tile, for j < 2
// * pairs.
template <class Element, class Factor, int kRank, int kBlocks>
__device__ inline void multiply_narrow(float (&acc)[kBlocks][4], const uint32_t (&a)[4],
                                       const unsigned char* tile, int k, int first_column, int r,
                                       int lane) {
  if constexpr (NarrowTile<Factor, kRank>::kFloat) {
    constexpr int kRow = NarrowTile<Factor, kRank>::kRowFloats;
    const float* b =
        reinterpret_cast<const float*>(tile) + (k + lane % 4 * 2) * kRow + first_column + lane / 4;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (first_column + j * 8 >= r) break;
      const float* at = b + j * 8;
      mma16_float_b<Element>(acc[j], a,
                             FloatTerms({at[0], at[kRow]}, {at[8 * kRow], at[9 * kRow]}));
    }
  } else {
    const uint32_t shared = ptx::shared_address(tile);
#pragma unroll
    for (int pair = 0; pair < kBlocks / 2; ++pair) {
      if (first_column + pair * 16 >= r) break;
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b,
                             shared + b_fragment_trans<kRank>(first_column + pair * 16, k, lane));
      mma16<Element>(acc[2 * pair], a, b[0], b[1]);
      mma16<Element>(acc[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// ---- the pass over dy

struct DyPassParams {
  int64_t m = 0, n = 0;
  int r = 0;
  const void* dy = nullptr;  // [M, N]
  int64_t dy_stride = 0;
  bool dy_aligned = false;
  const void* lora_b = nullptr;  // [N, R]
  int64_t lora_b_stride = 0;
  bool lora_b_aligned = false;
  const float* s = nullptr;  // [M, R], from the forward pass; null: dlora_b is not wanted
  bool s_aligned = false;
  double scaling = 0.0;  // 1 / (1 - p) included
  float* ds = nullptr;   // [M, R] rows of ds_stride; null: not needed in float32
  int64_t ds_stride = 0;
  TermsOut terms;  // ds as the GEMM's operand, and (segment 0) as the x pass's
  bool want_ds = true;
  float* dlora_b_parts =
      nullptr;      // [tiles, N, R], or the result itself where there is one tile and it is float32
  FactorCopy copy;  // of lora_a, for the GEMM
  int row_blocks = 0;
};

template <class Element, class Factor, int kRank, int kRowBlocks, int kWarps, int kStages>
struct DyPass {
  static constexpr int kRows = 16 * kRowBlocks;  // rows of dy per CTA
  static constexpr int kThreads = 32 * kWarps;
  using Narrow = NarrowTile<Factor, kRank>;
  static constexpr int kDyBytes = kRows * kPanel * 2;
  static constexpr int kStageBytes = kDyBytes + Narrow::bytes(kPanel);
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSumRow = kRank + 8;                       // see sum_row
  static constexpr int kSumBytes = kWarps * kRows * kSumRow * 4;  // reuses the ring
  static constexpr int kBodyBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
  static constexpr int kSharedBytes = kBodyBytes + Narrow::bytes(kRows);
};

template <class Element, class Factor, int kRank, int kRowBlocks, int kWarps, int kStages>
__global__ void __launch_bounds__(32 * kWarps, 2) dy_pass_kernel(const DyPassParams p) {
  using Pass = DyPass<Element, Factor, kRank, kRowBlocks, kWarps, kStages>;
  extern __shared__ __align__(128) unsigned char shared[];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (static_cast<int>(blockIdx.x) >= p.row_blocks) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) - p.row_blocks;
    copy_factor<Element>(p.copy, first * Pass::kThreads + threadIdx.x,
                         (static_cast<int64_t>(gridDim.x) - p.row_blocks) * Pass::kThreads);
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * Pass::kRows;
  unsigned char* const ring = shared + warp * kStages * Pass::kStageBytes;
  unsigned char* const s_tile = shared + Pass::kBodyBytes;
  const auto* dy = static_cast<const Element*>(p.dy);

  // s in the factor's type; 16-bit elements where lora_b has them, as PEFT's order of operations
  // rounds it too.
  if (p.s) {
    for (int i = threadIdx.x; i < Pass::kRows * kRank; i += Pass::kThreads) {
      const int row = i / kRank, column = i % kRank;
      const float v = m0 + row < p.m && column < p.r ? p.s[(m0 + row) * p.r + column] : 0.f;
      if constexpr (sizeof(Factor) == 4)
        reinterpret_cast<float*>(s_tile)[row * Pass::Narrow::kRowFloats + column] = v;
      else
        *reinterpret_cast<Element*>(s_tile + tile_offset<kRank>(row, column / kChunk) +
                                    column % kChunk * 2) = ElementTraits<Element>::from_float(v);
    }
  }
  __syncthreads();

  const auto fill = [&](int64_t panel, int slot) {
    const int64_t n0 = panel * kPanel;
    if (n0 < p.n) {
      unsigned char* stage = ring + slot * Pass::kStageBytes;
      const uint32_t target = ptx::shared_address(stage);
      constexpr int kChunks = kPanel / kChunk;
#pragma unroll
      for (int i = lane; i < Pass::kRows * kChunks; i += 32) {
        const int row = i / kChunks, chunk = i % kChunks;
        const int64_t n = n0 + chunk * kChunk;
        fill_chunk(target + tile_offset<kPanel>(row, chunk), dy + (m0 + row) * p.dy_stride + n,
                   m0 + row < p.m ? p.n - n : 0, p.dy_aligned);
      }
      if (p.want_ds)
        fill_narrow<Factor, kRank>(stage + Pass::kDyBytes, p.lora_b, p.lora_b_stride, n0, p.n - n0,
                                   p.r, p.lora_b_aligned, kPanel, lane, 32);
    }
    ptx::cp_async_commit();
  };

  float ds[kRowBlocks][kRank / 8][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fill(warp + stage * kWarps, stage);
  int slot = 0;
#pragma unroll 1
  for (int64_t panel = warp; panel * kPanel < p.n; panel += kWarps) {
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();
    fill(panel + (kStages - 1) * kWarps, slot == 0 ? kStages - 1 : slot - 1);
    const unsigned char* stage = ring + slot * Pass::kStageBytes;
    const uint32_t tile = ptx::shared_address(stage);
    if (p.want_ds) {
#pragma unroll
      for (int k = 0; k < kPanel; k += 16)
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) {
          uint32_t a[4];
          ptx::ldmatrix_x4(a, tile + a_fragment<kPanel>(i * 16, k, lane));
          multiply_narrow<Element, Factor, kRank>(ds[i], a, stage + Pass::kDyBytes, k, 0, p.r,
                                                  lane);
        }
    }
    if (p.s) {
      constexpr int kColumns = kRank < 64 ? kRank : 64;
      float* parts = p.dlora_b_parts + static_cast<int64_t>(blockIdx.x) * p.n * p.r;
#pragma unroll
      for (int block = 0; block < kPanel / 16; ++block)
#pragma unroll 1
        for (int first = 0; first < p.r; first += kColumns) {
          float acc[kColumns / 8][4] = {};
#pragma unroll
          for (int i = 0; i < kRowBlocks; ++i) {
            uint32_t a[4];
            ptx::ldmatrix_x4_trans(a, tile + a_fragment_trans<kPanel>(block * 16, i * 16, lane));
            multiply_narrow<Element, Factor, kRank>(acc, a, s_tile, i * 16, first, p.r, lane);
          }
#pragma unroll
          for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int64_t n = panel * kPanel + block * 16 + lane / 4 + half * 8;
              const int r = first + j * 8 + lane % 4 * 2;
              if (n >= p.n || r >= p.r) continue;
              float* out = parts + n * p.r + r;
              if (p.r % 2 == 0) {
                ptx::store_global_v2(out, acc[j][2 * half], acc[j][2 * half + 1]);
              } else {
                out[0] = acc[j][2 * half];
                if (r + 1 < p.r) out[1] = acc[j][2 * half + 1];
              }
            }
        }
    }
    __syncwarp();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
  if (!p.want_ds) return;

  // ds: the warps' sums over their panels, added in the order of the warps.
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_shared_v2(
            ptx::shared_address(
                sums + (warp * Pass::kRows + i * 16 + lane / 4 + half * 8) * Pass::kSumRow + j * 8 +
                lane % 4 * 2),
            ds[i][j][2 * half], ds[i][j][2 * half + 1]);
  __syncthreads();
  const int columns = static_cast<int>(segment_columns(p.r));
  for (int i = threadIdx.x; i < Pass::kRows * columns; i += Pass::kThreads) {
    const int row = columns == 16 ? paired_row(i / columns) : i / columns;
    const int column = i % columns;
    const int64_t m = m0 + row;
    if (m >= p.m) continue;
    float sum = sums[row * Pass::kSumRow + column];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[(w * Pass::kRows + row) * Pass::kSumRow + column];
    sum = scaled(sum, p.scaling);
    if (p.ds && column < p.r) p.ds[m * p.ds_stride + column] = sum;
    store_terms<Element>(p.terms, m, p.r, column, sum);
  }
}

// ---- the pass over x

// dlora_b[i] = sum over parts, in order; the last CTAs of the x pass, or a launch of its own.
struct ReduceParams {
  const float* parts = nullptr;  // [count, elements]; null: nothing to reduce
  int64_t count = 0, elements = 0;
  void* out = nullptr;
  bool out_float = false;
};

template <class Element>
__device__ inline void reduce_parts(const ReduceParams& p, int64_t thread, int64_t threads) {
  if (p.elements % 4 == 0) {
    const auto* parts = reinterpret_cast<const float4*>(p.parts);
    const int64_t quads = p.elements / 4;
    for (int64_t i = thread; i < quads; i += threads) {
      float4 sum = parts[i];
#pragma unroll 4
      for (int64_t part = 1; part < p.count; ++part) sum = add_quads(sum, parts[part * quads + i]);
      if (p.out_float)
        store_quad(static_cast<float*>(p.out) + 4 * i, sum);
      else
        store_quad(static_cast<Element*>(p.out) + 4 * i, sum);
    }
    return;
  }
  for (int64_t i = thread; i < p.elements; i += threads) {
    float sum = p.parts[i];
    for (int64_t part = 1; part < p.count; ++part) sum += p.parts[part * p.elements + i];
    if (p.out_float)
      static_cast<float*>(p.out)[i] = sum;
    else
      static_cast<Element*>(p.out)[i] = ElementTraits<Element>::from_float(sum);
  }
}

struct XPassParams {
  int64_t m = 0, k = 0;
  int r = 0;
  const void* x = nullptr;  // [M, K]
  int64_t x_stride = 0;
  bool x_aligned = false;
  const void* ds = nullptr;  // [M, R], in the factor's type, scaled; rows of whole 16 bytes
  int64_t ds_stride = 0;
  Dropout dropout;
  void* dlora_a = nullptr;  // [R, K], in the factor's type
  ReduceParams reduce;
  int column_blocks = 0;  // CTAs beyond these reduce dlora_b
};

template <class Element, class Factor, int kRank, int kWarps, int kStages>
struct XPass {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsPerStep = 32;
  using Narrow = NarrowTile<Factor, kRank>;
  static constexpr int kXBytes = kRowsPerStep * kPanel * 2;
  static constexpr int kStageBytes = kXBytes + Narrow::bytes(kRowsPerStep);
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSumRow = kPanel + 4;  // two ranks' columns, eight each, lie in other banks
  static constexpr int kSumBytes = kWarps * kRank * kSumRow * 4;
  static constexpr int kSharedBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

template <class Element, class Factor, int kRank, int kWarps, int kStages>
__global__ void __launch_bounds__(32 * kWarps) x_pass_kernel(const XPassParams p) {
  using Pass = XPass<Element, Factor, kRank, kWarps, kStages>;
  extern __shared__ __align__(128) unsigned char shared[];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (static_cast<int>(blockIdx.x) >= p.column_blocks) {
    if (blockIdx.y == 0)
      reduce_parts<Element>(
          p.reduce,
          (static_cast<int64_t>(blockIdx.x) - p.column_blocks) * Pass::kThreads + threadIdx.x,
          (static_cast<int64_t>(gridDim.x) - p.column_blocks) * Pass::kThreads);
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x) * kPanel;
  const int first_rank = static_cast<int>(blockIdx.y) * kRank;
  const int r = p.r - first_rank < kRank ? p.r - first_rank : kRank;
  unsigned char* const ring = shared + warp * kStages * Pass::kStageBytes;
  const auto* x = static_cast<const Element*>(p.x);
  const auto* ds = static_cast<const Factor*>(p.ds) + first_rank;
  const uint64_t seed = p.dropout.seed ? *p.dropout.seed : 0;
  constexpr int kChunks = kPanel / kChunk;

  const auto fill = [&](int64_t step, int slot) {
    const int64_t m0 = step * Pass::kRowsPerStep;
    if (m0 < p.m) {
      unsigned char* stage = ring + slot * Pass::kStageBytes;
      const uint32_t target = ptx::shared_address(stage);
#pragma unroll
      for (int i = lane; i < Pass::kRowsPerStep * kChunks; i += 32) {
        const int row = i / kChunks, chunk = i % kChunks;
        const int64_t k = k0 + chunk * kChunk;
        fill_chunk(target + tile_offset<kPanel>(row, chunk), x + (m0 + row) * p.x_stride + k,
                   m0 + row < p.m ? p.k - k : 0, p.x_aligned);
      }
      fill_narrow<Factor, kRank>(stage + Pass::kXBytes, ds, p.ds_stride, m0, p.m - m0, r, true,
                                 Pass::kRowsPerStep, lane, 32);
    }
    ptx::cp_async_commit();
  };
  // Zeroes what dropout drops: each lane masks the chunks that it copied itself, which it already
  // sees.
  const auto mask = [&](int64_t step, unsigned char* stage) {
#pragma unroll 1
    for (int i = lane; i < Pass::kRowsPerStep * kChunks; i += 32) {
      const int64_t m = step * Pass::kRowsPerStep + i / kChunks, k = k0 + i % kChunks * kChunk;
      auto* chunk = reinterpret_cast<uint4*>(stage + tile_offset<kPanel>(i / kChunks, i % kChunks));
      *chunk = RowPair<Element>::masked(
          *chunk, keep_bits<kChunk>(seed, p.dropout.threshold, static_cast<uint64_t>(m * p.k + k)));
    }
  };

  float acc[2][kRank / 8][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fill(warp + stage * kWarps, stage);
  int slot = 0;
#pragma unroll 1
  for (int64_t step = warp; step * Pass::kRowsPerStep < p.m; step += kWarps) {
    ptx::cp_async_wait<kStages - 2>();
    unsigned char* stage = ring + slot * Pass::kStageBytes;
    if (p.dropout.seed) mask(step, stage);
    __syncwarp();
    fill(step + (kStages - 1) * kWarps, slot == 0 ? kStages - 1 : slot - 1);
    const uint32_t tile = ptx::shared_address(stage);
#pragma unroll
    for (int m = 0; m < Pass::kRowsPerStep; m += 16)
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, tile + a_fragment_trans<kPanel>(block * 16, m, lane));
        multiply_narrow<Element, Factor, kRank>(acc[block], a, stage + Pass::kXBytes, m, 0, r,
                                                lane);
      }
    __syncwarp();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }

  // The warps' sums over their rows, added in the order of the warps, transposed on the way out.
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
  constexpr int kRow = Pass::kSumRow;
#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* at =
            sums + (warp * kRank + j * 8 + lane % 4 * 2) * kRow + block * 16 + lane / 4 + half * 8;
        at[0] = acc[block][j][2 * half];
        at[kRow] = acc[block][j][2 * half + 1];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < r * kPanel; i += Pass::kThreads) {
    const int row = i / kPanel, column = i % kPanel;
    if (k0 + column >= p.k) continue;
    float sum = sums[row * kRow + column];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[(w * kRank + row) * kRow + column];
    const int64_t at = (first_rank + row) * p.k + k0 + column;
    if constexpr (sizeof(Factor) == 4)
      static_cast<float*>(p.dlora_a)[at] = sum;
    else
      static_cast<Factor*>(p.dlora_a)[at] = ElementTraits<Factor>::from_float(sum);
  }
}

// ---- what remains where there is no x pass, and the bias

template <class Element>
__global__ void __launch_bounds__(256) reduce_parts_kernel(const ReduceParams p) {
  ptx::grid_dependency_wait();
  reduce_parts<Element>(p, static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x,
                        static_cast<int64_t>(gridDim.x) * 256);
}

// dbias[n] = sum over m of dy[m][n]. A CTA takes 32 columns; eight rows of threads split m.
template <class Element>
__global__ void __launch_bounds__(256)
    column_sum_kernel(const Element* dy, int64_t stride, int64_t m, int64_t n, Element* dbias) {
  __shared__ float sums[8][33];
  const int column = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 32 + column;
  float sum = 0.f;
  if (at < n)
    for (int64_t row = part; row < m; row += 8)
      sum += ElementTraits<Element>::to_float(dy[row * stride + at]);
  sums[part][column] = sum;
  __syncthreads();
  if (part == 0 && at < n) {
    for (int i = 1; i < 8; ++i) sum += sums[i][column];
    dbias[at] = ElementTraits<Element>::from_float(sum);
  }
}

}  // namespace fused_peft::cuda
