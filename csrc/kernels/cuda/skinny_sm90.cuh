// What the sm_90 kernels of narrow products share: lora_a in the stages of a ring that TMA fills,
// and sums that the CTAs of a cluster, which split k, swap through distributed shared memory.
#pragma once

#include "kernels/cuda/lora_down_sm80.cuh"
#include "kernels/cuda/lora_linear_config.h"
#include "kernels/cuda/ring_sm90.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tensor_copy.cuh"

namespace fused_peft::cuda {

static_assert(kSkinnyBlockK == kSwizzledColumns);
constexpr int kBoxAlignment = 1024;  // of a swizzled box in shared memory

// Shared memory of a ring: its stages, then two barriers each. As many stages as fit beside `other`
// bytes, up to `most`.
constexpr int skinny_stages(int stage_bytes, int most = 8, int other = 0) {
  const int room = kSkinnySharedBytes - kBoxAlignment - other;
  const int fit = room / (stage_bytes + 2 * int{sizeof(uint64_t)});
  return fit < most ? fit : most;
}
constexpr int skinny_shared_bytes(int stages, int stage_bytes) {
  return kBoxAlignment + stages * (stage_bytes + 2 * int{sizeof(uint64_t)});
}

// A k-block of lora_a in a stage: rows of 128 bytes, swizzled by TMA as tile_offset is. Float32
// rows would be 256 bytes, which no swizzle spans: they come in panels of 8 k, dense, so that what
// a warp reads for one B fragment is contiguous.
template <class Factor, int kRank>
struct FactorStage {
  static constexpr int kPanelColumns = sizeof(Factor) == 4 ? kChunk : kSkinnyBlockK;
  static constexpr int kPanels = kSkinnyBlockK / kPanelColumns;
  static constexpr int kPanelBytes = kRank * kPanelColumns * int{sizeof(Factor)};
  static constexpr int kBytes = kPanels * kPanelBytes;

#if __CUDA_ARCH__ >= 900
  __device__ static void load(uint32_t stage, const CUtensorMap* lora_a, int k, uint32_t barrier) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::load_box(stage + panel * kPanelBytes, lora_a, k + panel * kPanelColumns, 0, barrier);
  }
#endif
};

#if __CUDA_ARCH__ >= 900

// The ring in a CTA's dynamic shared memory, `before` aligned bytes into it.
template <class Tile>
struct SkinnyRing {
  unsigned char* memory;
  uint32_t base;

  __device__ explicit SkinnyRing(unsigned char* shared, int before = 0) {
    const uint32_t unaligned = ptx::shared_address(shared);
    base = (unaligned + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment + before;
    memory = shared + (base - unaligned);
  }
  __device__ uint32_t stage(uint32_t i) const { return base + i * Tile::kStageBytes; }
  __device__ uint32_t full(uint32_t i) const { return stage(Tile::kStages) + 8 * i; }
  __device__ uint32_t empty(uint32_t i) const { return full(Tile::kStages + i); }
  // All threads of the CTA.
  __device__ void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Tile::kStages; ++i) {
        ptx::mbarrier_init(full(i), 1);
        ptx::mbarrier_init(empty(i), Tile::kConsumers);
      }
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
  }
  // By a warp that has read the stage.
  __device__ void release(uint32_t i, int lane) const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty(i));
  }
};

// Dropout on a warp's kRows rows and kColumns columns of a stage whose rows are 128 bytes: each
// lane masks a chunk in every kStep-th row.
template <class Element, int kColumns, int kRows>
struct StageMask {
  static constexpr int kLaneChunks = kColumns / kChunk, kStep = 32 / kLaneChunks;
  uint64_t seed, row_length, index;  // of the lane's first element, from the stage's first one
  uint32_t threshold;
  int row, chunk;

  // row, column: of the warp in the stage. Rows of x hold row_length elements, whole chunks.
  __device__ StageMask(const Dropout& dropout, int64_t row_length, int row, int column, int lane)
      : seed(dropout.seed ? *dropout.seed : 0),
        row_length(static_cast<uint64_t>(row_length)),
        threshold(dropout.threshold),
        row(row + lane_row(lane / kLaneChunks)),
        chunk(column / kChunk + lane % kLaneChunks) {
    index = static_cast<uint64_t>(this->row * row_length + this->chunk * kChunk);
  }
  // Of the rows that a quarter warp covers, two of four chunks, the swizzle puts one into the lower
  // half of the banks and one into the upper.
  __device__ static int lane_row(int i) { return kLaneChunks == 4 ? (i & 1) * 4 + i / 2 : i; }
  // first: the index in x of the stage's first element.
  __device__ void apply(unsigned char* stage, int64_t first) const {
    uint64_t at = static_cast<uint64_t>(first) + index;
#pragma unroll 1
    for (int i = 0; i < kRows; i += kStep, at += kStep * row_length) {
      auto* words = reinterpret_cast<uint4*>(stage + tile_offset<kSwizzledColumns>(row + i, chunk));
      *words = RowPair<Element>::masked(*words, keep_bits_whole<kChunk>(seed, threshold, at));
    }
    __syncwarp();
  }
};

// acc[j] += rows of x times ranks first + 8j .. of this stage's lora_a, over one k16 step.
template <class Element, class Factor, int kRank, int kBlocks>
__device__ inline void multiply_factor(float (&acc)[kBlocks][4], const uint32_t (&a)[4],
                                       const unsigned char* tile, int step, int first, int r,
                                       int lane) {
  if constexpr (sizeof(Factor) == 2) {
    const uint32_t shared = ptx::shared_address(tile);
    if constexpr (kBlocks == 1) {
      uint32_t b[2];
      ptx::ldmatrix_x2(b, shared + b_fragment<kSkinnyBlockK>(first, step * 16, lane & 15));
      mma16<Element>(acc[0], a, b[0], b[1]);
    } else {
#pragma unroll
      for (int pair = 0; pair < kBlocks / 2; ++pair) {
        if (first + pair * 16 >= r) break;
        uint32_t b[4];
        ptx::ldmatrix_x4(b, shared + b_fragment<kSkinnyBlockK>(first + pair * 16, step * 16, lane));
        mma16<Element>(acc[2 * pair], a, b[0], b[1]);
        mma16<Element>(acc[2 * pair + 1], a, b[2], b[3]);
      }
    }
  } else {
    constexpr int kPanelBytes = FactorStage<Factor, kRank>::kPanelBytes;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const int column = first + j * 8;
      if (column >= r) break;
      const unsigned char* at = tile + 2 * step * kPanelBytes + column * kChunk * 4 + lane * 8;
      mma16_float_b<Element>(acc[j], a,
                             FloatTerms(*reinterpret_cast<const float2*>(at),
                                        *reinterpret_cast<const float2*>(at + kPanelBytes)));
    }
  }
}

// One m16n8 accumulator into a row-major matrix of sums.
__device__ inline void store_sums(float* sums, int row_floats, int column, const float (&acc)[4],
                                  int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    ptx::store_shared_v2(
        ptx::shared_address(sums + (lane / 4 + half * 8) * row_floats + column + lane % 4 * 2),
        acc[2 * half], acc[2 * half + 1]);
}

// The sum over the cluster, in the order of the ranks, of the float at one place of their memory.
__device__ inline float add_ranks(const float* own) {
  const uint32_t address = ptx::shared_address(own);
  const uint32_t ranks = ptx::cluster_cta_count();
  float sum = ptx::load_cluster(ptx::cluster_address(address, 0));
  for (uint32_t rank = 1; rank < ranks; ++rank)
    sum += ptx::load_cluster(ptx::cluster_address(address, rank));
  return sum;
}
// The same of four floats.
__device__ inline float4 add_ranks(const float4* own) {
  const uint32_t address = ptx::shared_address(own);
  const uint32_t ranks = ptx::cluster_cta_count();
  float4 sum = ptx::load_cluster_v4(ptx::cluster_address(address, 0));
  for (uint32_t rank = 1; rank < ranks; ++rank)
    sum = add_quads(sum, ptx::load_cluster_v4(ptx::cluster_address(address, rank)));
  return sum;
}

// Rows of s or ds that a cluster has summed up, and where they go, scaled.
struct ClusterRows {
  int64_t first, rows;  // the cluster's first row, how many there are in all
  int r;
  double scaling;
  float* out;  // [rows, r] rows of out_stride; null: not needed in float32
  int64_t out_stride;
  TermsOut terms;

  template <class Element>
  __device__ void store(int row, int column, float4 v) const {
    v = {scaled(v.x, scaling), scaled(v.y, scaling), scaled(v.z, scaling), scaled(v.w, scaling)};
    const int64_t m = first + row;
    const int valid = r - column;
    float* const to = out + m * out_stride + column;
    if (out && out_stride % 4 == 0) {
      if (valid > 0) store_quad(to, v);
    } else if (out) {
      if (valid > 0) to[0] = v.x;
      if (valid > 1) to[1] = v.y;
      if (valid > 2) to[2] = v.z;
      if (valid > 3) to[3] = v.w;
    }
    store_terms_quad<Element>(terms, m, r, column, v);
  }
};

// This CTA's part of kRows rows of kRank sums, of which each CTA has some at `sums`, in rows of
// sum_row(kRank) floats: four columns at a time.
template <class Element, int kRank, int kRows, int kThreads>
__device__ inline void finish_rows(const float* sums, const ClusterRows& out) {
  constexpr int kQuads = kRank / 4;
  const int columns = static_cast<int>(segment_columns(out.r));
  ptx::cluster_sync();
  const int rows = kRows / static_cast<int>(ptx::cluster_cta_count());
  const int first = rows * static_cast<int>(ptx::cluster_cta_rank());
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kQuads; i += kThreads) {
    const int row = first + (kRank == 16 ? paired_row(i / kQuads) : i / kQuads);
    const int column = i % kQuads * 4;
    if (out.first + row >= out.rows || column >= columns) continue;
    out.store<Element>(
        row, column,
        add_ranks(reinterpret_cast<const float4*>(sums + row * sum_row(kRank) + column)));
  }
  ptx::cluster_sync();  // until no CTA reads this one's memory any more
}

#endif

}  // namespace fused_peft::cuda
