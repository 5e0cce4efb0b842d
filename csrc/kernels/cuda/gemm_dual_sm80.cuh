// c = sum over two sources of a b^T, + bias, rounded once: the GEMM of a LoRA layer, both ways.
//
//   forward   y  = x W^T  +  s lora_b^T  + bias      sources (x, W), (s, lora_b)
//   backward  dx = keep * (ds lora_a)  +  dy W       sources (ds, lora_a^T), (dy, W^T)
//
// One ring of cp.async stages runs over the k tiles of the first source and goes on over those of
// the second, so the low-rank update costs ceil(R / 32) more tiles and no pass over c. Dropout
// masks the low-rank product alone: in the backward pass that product comes first and the
// accumulators are masked before the other is added.
#pragma once

#include <cstdint>

#include "kernels/cuda/philox.cuh"
#include "kernels/cuda/tile.cuh"
#include "kernels/ptx/grid_dependency.cuh"
#include "kernels/ptx/store.cuh"

namespace fused_peft::cuda {

struct GemmSource {
  const void* a = nullptr;  // [M, k], rows contiguous
  const void* b = nullptr;  // [N, k] (k contiguous) or [k, N] (N contiguous)
  int64_t a_stride = 0, b_stride = 0;
  int32_t k = 0;
  bool a_aligned = false, b_aligned = false;  // 16-byte rows and base
};

struct GemmParams {
  int64_t m = 0, n = 0;
  GemmSource source[2];
  Dropout dropout;  // keep * applies to the first source's product
  const void* bias = nullptr;
  void* c = nullptr;  // [M, N]
  int64_t c_stride = 0;
  bool c_aligned = false;
  // Fused down projection (kDownRank > 0): source[1].a is not read; s = scaling x lora_a^T is
  // formed by each CTA.
  const void* lora_a = nullptr;
  int64_t lora_a_stride = 0;
  bool lora_a_aligned = false;
  float scaling = 0.f;
  float* s = nullptr;  // [M, R], written by the CTAs of the first column
};

template <int BLOCK_M_, int BLOCK_N_, int kStages_>
struct GemmTile {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = 32;
  static constexpr int kStages = kStages_, kThreads = 128;
  static constexpr int kStageBytesA = BLOCK_M * BLOCK_K * 2, kStageBytesB = BLOCK_N * BLOCK_K * 2;
  static constexpr int kWarpM = BLOCK_M / 2, kWarpN = BLOCK_N / 2;  // four warps, two by two
  static constexpr int kRowBlocks = kWarpM / 16, kColumnBlocks = kWarpN / 8;
  static_assert(BLOCK_M % 32 == 0 && BLOCK_N % 32 == 0);
  static constexpr int kMaskBytes = BLOCK_M * BLOCK_N / 8;
  __host__ __device__ static constexpr int shared_bytes(int down_rank) {
    return kStages * (kStageBytesA + kStageBytesB + down_rank * BLOCK_K * 2);
  }
};

// Walks the k tiles of one source and fills ring slots with them. A thread fills the same chunk of
// every 32nd row.
template <class Element, class Tile, bool kBKMajor, bool kAligned>
struct SourceLoader {
  static constexpr int kChunksA = Tile::BLOCK_M / 32, kChunksB = Tile::BLOCK_N / 32;
  static constexpr int kChunksPerRowB = kBKMajor ? 4 : Tile::BLOCK_N / kChunk;
  static constexpr int kRowsPerStepB = Tile::kThreads / kChunksPerRowB;

  const Element *a, *b;    // this thread's chunk of the next tile
  int64_t a_step, b_step;  // to its next row
  uint32_t a_rows;         // bit i: row i exists
  int32_t b_valid;         // k major: rows bits; else valid elements of the chunk's row
  int32_t k_left;
  bool a_aligned, b_aligned;
  int64_t b_stride;

  __device__ void start(const GemmSource& source, int64_t m0, int64_t n0, int64_t m, int64_t n) {
    const int thread = threadIdx.x;
    const int row = thread / 4, chunk = thread % 4;
    a = static_cast<const Element*>(source.a) + (m0 + row) * source.a_stride + chunk * kChunk;
    a_step = 32 * source.a_stride;
    a_rows = 0;
#pragma unroll
    for (int i = 0; i < kChunksA; ++i) a_rows |= uint32_t{m0 + row + 32 * i < m} << i;
    k_left = source.k;
    a_aligned = kAligned || source.a_aligned;
    b_aligned = kAligned || source.b_aligned;
    b_stride = source.b_stride;
    const auto* base = static_cast<const Element*>(source.b);
    if (kBKMajor) {
      b = base + (n0 + row) * source.b_stride + chunk * kChunk;
      b_step = 32 * source.b_stride;
      b_valid = 0;
#pragma unroll
      for (int i = 0; i < kChunksB; ++i) b_valid |= int32_t{n0 + row + 32 * i < n} << i;
    } else {
      const int k = thread / kChunksPerRowB, column = thread % kChunksPerRowB * kChunk;
      b = base + k * source.b_stride + n0 + column;
      b_step = kRowsPerStepB * source.b_stride;
      const int64_t left = n - n0 - column;
      b_valid = static_cast<int32_t>(left > kChunk ? kChunk : left);
    }
  }

  // slot_a, slot_b: this thread's chunk of the slot.
  __device__ void fill_a(uint32_t slot_a) {
    const int32_t valid = k_left - static_cast<int32_t>(threadIdx.x % 4) * kChunk;
#pragma unroll
    for (int i = 0; i < kChunksA; ++i)
      fill_chunk(slot_a + i * 32 * Tile::BLOCK_K * 2, a + i * a_step, (a_rows >> i & 1) ? valid : 0,
                 kAligned || a_aligned);
  }
  __device__ void fill_b(uint32_t slot_b) {
    if (kBKMajor) {
      const int32_t valid = k_left - static_cast<int32_t>(threadIdx.x % 4) * kChunk;
#pragma unroll
      for (int i = 0; i < kChunksB; ++i)
        fill_chunk(slot_b + i * 32 * Tile::BLOCK_K * 2, b + i * b_step,
                   (b_valid >> i & 1) ? valid : 0, kAligned || b_aligned);
    } else {
      const int32_t row = static_cast<int32_t>(threadIdx.x) / kChunksPerRowB;
#pragma unroll
      for (int i = 0; i < kChunksB; ++i)
        fill_chunk(slot_b + i * kRowsPerStepB * Tile::BLOCK_N * 2, b + i * b_step,
                   row + i * kRowsPerStepB < k_left ? b_valid : 0, kAligned || b_aligned);
    }
  }
  __device__ void advance() {
    a += Tile::BLOCK_K;
    b += kBKMajor ? int64_t{Tile::BLOCK_K} : Tile::BLOCK_K * b_stride;
    k_left -= Tile::BLOCK_K;
  }
};

// The accumulators of one warp and the k steps on a filled slot.
template <class Element, class Tile, bool kBKMajor>
struct WarpProduct {
  float acc[Tile::kRowBlocks][Tile::kColumnBlocks][4] = {};
  uint32_t a_lane[2], b_lane[2 * (kBKMajor ? 1 : Tile::kColumnBlocks / 2)];

  __device__ void start(int warp_m, int warp_n, int lane) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      a_lane[step] = a_fragment<Tile::BLOCK_K>(warp_m * Tile::kWarpM, 16 * step, lane);
      if (kBKMajor)
        b_lane[step] = b_fragment<Tile::BLOCK_K>(warp_n * Tile::kWarpN, 16 * step, lane);
    }
    if (!kBKMajor) {
#pragma unroll
      for (int pair = 0; pair < Tile::kColumnBlocks / 2; ++pair)
        b_lane[pair] = b_fragment_trans<Tile::BLOCK_N>(warp_n * Tile::kWarpN + 16 * pair, 0, lane);
    }
  }

  // steps: k steps of 16 that hold data, 1 or 2.
  __device__ void accumulate(uint32_t slot_a, uint32_t slot_b, int steps) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if (step >= steps) break;
      uint32_t a[Tile::kRowBlocks][4];
#pragma unroll
      for (int i = 0; i < Tile::kRowBlocks; ++i)
        ptx::ldmatrix_x4(a[i], slot_a + a_lane[step] + i * 16 * Tile::BLOCK_K * 2);
#pragma unroll
      for (int pair = 0; pair < Tile::kColumnBlocks / 2; ++pair) {
        uint32_t b[4];
        if (kBKMajor)
          ptx::ldmatrix_x4(b, slot_b + b_lane[step] + pair * 16 * Tile::BLOCK_K * 2);
        else
          ptx::ldmatrix_x4_trans(b, slot_b + b_lane[pair] + step * 16 * Tile::BLOCK_N * 2);
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks; ++i) {
          mma16<Element>(acc[i][2 * pair], a[i], b[0], b[1]);
          mma16<Element>(acc[i][2 * pair + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
};

// The keep bits of the CTA's tile of c, 32 columns a word, into shared memory; made before the
// accumulators exist, which leave no registers for Philox.
template <class Tile>
__device__ void make_mask(const GemmParams& p, uint32_t* mask, int64_t m0, int64_t n0) {
  constexpr int kWordsPerRow = Tile::BLOCK_N / 32;
  const uint64_t seed = *p.dropout.seed;
#pragma unroll 1
  for (int word = threadIdx.x; word < Tile::BLOCK_M * kWordsPerRow; word += Tile::kThreads) {
    const uint64_t row = static_cast<uint64_t>(m0 + word / kWordsPerRow);
    const uint64_t column = static_cast<uint64_t>(n0 + word % kWordsPerRow * 32);
    mask[word] =
        keep_bits<32>(seed, p.dropout.threshold, row * static_cast<uint64_t>(p.n) + column);
  }
}

// acc *= keep. row, column: of the thread's first accumulator in the tile.
template <class Tile>
__device__ void mask_accumulators(float (&acc)[Tile::kRowBlocks][Tile::kColumnBlocks][4],
                                  const uint32_t* mask, int row, int column) {
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < Tile::kColumnBlocks; ++j) {
        const int at = column + j * 8;
        const uint32_t keep =
            mask[(row + i * 16 + half * 8) * (Tile::BLOCK_N / 32) + at / 32] >> (at % 32);
        if (!(keep & 1)) acc[i][j][2 * half] = 0.f;
        if (!(keep & 2)) acc[i][j][2 * half + 1] = 0.f;
      }
}

// Rounds the accumulators (+ bias), and writes them through shared memory so that stores are whole
// rows.
template <class Element, class Tile>
__device__ void store_tile(const float (&acc)[Tile::kRowBlocks][Tile::kColumnBlocks][4],
                           const GemmParams& p, uint32_t shared,
                           const unsigned char* shared_pointer, int64_t m0, int64_t n0, int warp_m,
                           int warp_n, int lane) {
  using Traits = ElementTraits<Element>;
  const int row = warp_m * Tile::kWarpM + lane / 4, column = warp_n * Tile::kWarpN + lane % 4 * 2;
  const auto* bias = static_cast<const Element*>(p.bias);
#pragma unroll
  for (int j = 0; j < Tile::kColumnBlocks; ++j) {
    float add[2] = {0.f, 0.f};
    if (bias) {
      const int64_t n = n0 + column + j * 8;
      if (n < p.n) add[0] = Traits::to_float(bias[n]);
      if (n + 1 < p.n) add[1] = Traits::to_float(bias[n + 1]);
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair =
            Traits::pack(acc[i][j][2 * half] + add[0], acc[i][j][2 * half + 1] + add[1]);
        const uint32_t offset =
            tile_offset<Tile::BLOCK_N>(row + i * 16 + half * 8, (column + j * 8) / kChunk) +
            lane % 4 * 4;
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(shared + offset), "r"(pair) : "memory");
      }
  }
  __syncthreads();
  constexpr int kChunksPerRow = Tile::BLOCK_N / kChunk;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::BLOCK_M * kChunksPerRow; i += Tile::kThreads) {
    const int tile_row = i / kChunksPerRow, chunk = i % kChunksPerRow;
    const int64_t m = m0 + tile_row, n = n0 + chunk * kChunk;
    if (m >= p.m || n >= p.n) continue;
    const uint4 values = *reinterpret_cast<const uint4*>(
        shared_pointer + tile_offset<Tile::BLOCK_N>(tile_row, chunk));
    auto* out = static_cast<Element*>(p.c) + m * p.c_stride + n;
    if (p.c_aligned && n + kChunk <= p.n) {
      ptx::store_global_v4(out, values);
    } else {
      const uint32_t words[4] = {values.x, values.y, values.z, values.w};
      for (int e = 0; e < kChunk && n + e < p.n; ++e)
        reinterpret_cast<uint16_t*>(out)[e] = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
    }
  }
}

// CTA -> tile: columns of eight row tiles, so that the CTAs that run together share rows of a and
// of b in L2.
__device__ inline void tile_of_block(int64_t tiles_m, int64_t tiles_n, int64_t* tile_m,
                                     int64_t* tile_n) {
  constexpr int64_t kGroup = 8;
  const int64_t block = blockIdx.x, group = block / (kGroup * tiles_n);
  const int64_t first = group * kGroup;
  const int64_t rows = tiles_m - first < kGroup ? tiles_m - first : kGroup;
  const int64_t inside = block - group * kGroup * tiles_n;
  *tile_m = first + inside % rows;
  *tile_n = inside / rows;
}

// kAligned: every operand's rows are 16-byte aligned. kMask: GemmParams::dropout masks the first
// product.
template <class Element, class Tile, bool kBKMajor, int kDownRank, bool kAligned, bool kMask>
__global__ void __launch_bounds__(Tile::kThreads) gemm_dual_kernel(const GemmParams p) {
  extern __shared__ __align__(128) unsigned char ring[];
  constexpr int kStages = Tile::kStages;
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % 2, warp_n = threadIdx.x / 64;
  int64_t tile_m, tile_n;
  tile_of_block((p.m + Tile::BLOCK_M - 1) / Tile::BLOCK_M,
                (p.n + Tile::BLOCK_N - 1) / Tile::BLOCK_N, &tile_m, &tile_n);
  const int64_t m0 = tile_m * Tile::BLOCK_M, n0 = tile_n * Tile::BLOCK_N;

  const uint32_t ring_a = ptx::shared_address(ring), ring_b = ring_a + kStages * Tile::kStageBytesA;
  const uint32_t ring_down = ring_b + kStages * Tile::kStageBytesB;
  const int thread = threadIdx.x;
  const uint32_t chunk_a = tile_offset<Tile::BLOCK_K>(thread / 4, thread % 4);
  constexpr int kChunksPerRowB = Tile::BLOCK_N / kChunk;
  const uint32_t chunk_b =
      kBKMajor ? chunk_a
               : tile_offset<Tile::BLOCK_N>(thread / kChunksPerRowB, thread % kChunksPerRowB);

  // Lives only while the down projection is formed: s's accumulators, two warps share rows and
  // split the rank.
  constexpr int kDownBlocks = kDownRank / 16;
  float down[kDownRank ? Tile::kRowBlocks : 1][kDownRank ? kDownBlocks : 1][4] = {};

  SourceLoader<Element, Tile, kBKMajor, kAligned> loader;
  loader.start(p.source[0], m0, n0, p.m, p.n);
  const int tiles_first = (p.source[0].k + Tile::BLOCK_K - 1) / Tile::BLOCK_K;
  const int tiles_second = kDownRank ? 0 : (p.source[1].k + Tile::BLOCK_K - 1) / Tile::BLOCK_K;
  const int tiles = tiles_first + tiles_second;

  const auto fill_down = [&](int slot) {
    if constexpr (kDownRank > 0) {
      const auto* lora_a = static_cast<const Element*>(p.lora_a);
      const int32_t valid = loader.k_left - thread % 4 * kChunk;
      const int64_t k = p.source[0].k - loader.k_left + thread % 4 * kChunk;
#pragma unroll
      for (int row = thread / 4; row < kDownRank; row += 32)
        fill_chunk(ring_down + slot * kDownRank * Tile::BLOCK_K * 2 +
                       tile_offset<Tile::BLOCK_K>(row, thread % 4),
                   lora_a + row * p.lora_a_stride + k, row < p.source[1].k ? valid : 0,
                   kAligned || p.lora_a_aligned);
    }
  };
  const auto fill = [&](int tile, int slot) {
    if (tile < tiles) {
      if (tile == tiles_first) {
        ptx::grid_dependency_wait();  // the second source may be the previous kernel's output
        loader.start(p.source[1], m0, n0, p.m, p.n);
      }
      loader.fill_a(ring_a + slot * Tile::kStageBytesA + chunk_a);
      loader.fill_b(ring_b + slot * Tile::kStageBytesB + chunk_b);
      fill_down(slot);
      loader.advance();
    }
    ptx::cp_async_commit();
  };

  uint32_t* const mask = reinterpret_cast<uint32_t*>(ring + Tile::shared_bytes(kDownRank));
  if (kMask) {
    ptx::grid_dependency_wait();
    make_mask<Tile>(p, mask, m0, n0);
  }
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) fill(tile, tile);

  WarpProduct<Element, Tile, kBKMajor> product;
  product.start(warp_m, warp_n, lane);
  int slot = 0, next_slot = kStages - 1;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    fill(tile + kStages - 1, next_slot);
    const uint32_t slot_a = ring_a + slot * Tile::kStageBytesA,
                   slot_b = ring_b + slot * Tile::kStageBytesB;
    // The last tile of the low-rank source often holds one step of data only.
    const int left = tile < tiles_first ? p.source[0].k - tile * Tile::BLOCK_K
                                        : p.source[1].k - (tile - tiles_first) * Tile::BLOCK_K;
    product.accumulate(slot_a, slot_b, left > 16 ? 2 : 1);
    if constexpr (kDownRank > 0) {
      const uint32_t slot_down = ring_down + slot * kDownRank * Tile::BLOCK_K * 2;
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks; ++i) {
          uint32_t a[4];
          ptx::ldmatrix_x4(a, slot_a + product.a_lane[step] + i * 16 * Tile::BLOCK_K * 2);
#pragma unroll
          for (int j = 0; j < kDownBlocks; ++j) {
            // 8 columns of the rank at a time, so both halves of b are of the same columns.
            const int column = (warp_n * kDownBlocks + j) * 8;
            uint32_t b[2];
            ptx::ldmatrix_x2(b, slot_down + tile_offset<Tile::BLOCK_K>(
                                                column + (lane & 7), 2 * step + ((lane >> 3) & 1)));
            mma16<Element>(down[i][j], a, b[0], b[1]);
          }
        }
    }
    if (kMask && tile + 1 == tiles_first)
      mask_accumulators<Tile>(product.acc, mask, warp_m * Tile::kWarpM + lane / 4,
                              warp_n * Tile::kWarpN + lane % 4 * 2);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    next_slot = next_slot + 1 == kStages ? 0 : next_slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  if constexpr (kDownRank > 0) {
    // s becomes the a operand of up to two more tiles, lora_b's rows the b operand.
    const int rank = p.source[1].k;
    const int warp_row = warp_m * Tile::kWarpM + lane / 4;
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i)
#pragma unroll
      for (int j = 0; j < kDownBlocks; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + i * 16 + half * 8,
                    r = (warp_n * kDownBlocks + j) * 8 + lane % 4 * 2;
          const float s0 = down[i][j][2 * half] * p.scaling,
                      s1 = down[i][j][2 * half + 1] * p.scaling;
          const uint32_t target = ring_a + r / 32 * Tile::kStageBytesA +
                                  tile_offset<Tile::BLOCK_K>(row, r % 32 / kChunk) + lane % 4 * 4;
          asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(target),
                       "r"(ElementTraits<Element>::pack(s0, s1))
                       : "memory");
          if (tile_n == 0 && m0 + row < p.m) {
            if (r < rank) p.s[(m0 + row) * rank + r] = s0;
            if (r + 1 < rank) p.s[(m0 + row) * rank + r + 1] = s1;
          }
        }
    loader.start(p.source[1], m0, n0, p.m, p.n);
    constexpr int kDownTiles = (kDownRank + Tile::BLOCK_K - 1) / Tile::BLOCK_K;
#pragma unroll
    for (int tile = 0; tile < kDownTiles; ++tile) {
      loader.fill_b(ring_b + tile * Tile::kStageBytesB + chunk_b);
      loader.advance();
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kDownTiles; ++tile)
      product.accumulate(ring_a + tile * Tile::kStageBytesA, ring_b + tile * Tile::kStageBytesB,
                         kDownRank == 16 ? 1 : 2);
    __syncthreads();
  }
  store_tile<Element, Tile>(product.acc, p, ring_a, ring, m0, n0, warp_m, warp_n, lane);
}

}  // namespace fused_peft::cuda
