// The whole layer for at most 16 tokens in one launch, for sm_90: what lora_decode_sm80.cuh
// computes, with W streamed by TMA and k split over a cluster.
//
// A cluster owns kBlockN columns of y. Its CTAs take every (cluster size)-th k-block of their rows
// of W, and of x and all of lora_a beside them: s costs R / kBlockN of W's traffic, from L2 (a CTA
// of the sm_80 kernel, which owns 32 columns, reads four times as much), and no CTA waits for
// another before the end. Then the CTAs swap their sums through distributed shared memory: each
// adds up, in the order of the ranks, all of s and its own part of the columns.
//
// Rows and columns that do not exist are zeros that TMA fills in, so nothing here has a tail but
// the stores.
#pragma once

#include "kernels/cuda/skinny_sm90.cuh"

namespace fused_peft::cuda {

struct LoraDecodeSm90Params {
  CUtensorMap weight;  // [N, K], boxes of kBlockN x kBlockK
  CUtensorMap x;       // [M, K], boxes of 16 x kBlockK
  CUtensorMap lora_a;  // [R, K], boxes of FactorStage
  int32_t m = 0, n = 0, r = 0;
  int32_t k_blocks = 0;          // ceil(K / kBlockK)
  const void* lora_b = nullptr;  // [N, R], rows contiguous
  int64_t lora_b_stride = 0;
  double scaling = 0.0;
  const void* bias = nullptr;
  float* s = nullptr;  // [M, R]
  void* y = nullptr;   // [M, N]
  int64_t y_stride = 0;
};

// A stage holds one k-block: rows of W, of x and of lora_a.
template <class Factor, int kRank>
struct DecodeTile {
  static constexpr int kBlockN = kDecodeBlockN, kBlockK = kSkinnyBlockK;
  static constexpr int kConsumers = 8;  // warps; one more is the producer
  static constexpr int kThreads = 32 * (kConsumers + 1);
  static constexpr int kWarpColumns = kBlockN / kConsumers;
  static_assert(kWarpColumns == 16, "one b fragment");
  static constexpr int kXOffset = kBlockN * kBlockK * 2;
  static constexpr int kFactorOffset = kXOffset + kSkinnyRows * kBlockK * 2;
  using Stage = FactorStage<Factor, kRank>;
  static constexpr int kStageBytes = kFactorOffset + Stage::kBytes;
  // s: a warp takes one of the block's k16 steps and a part of the ranks.
  static constexpr int kSteps = kBlockK / 16;
  static constexpr int kRankPart = kRank / (kConsumers / kSteps);

  static constexpr int kStages = skinny_stages(kStageBytes);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = skinny_shared_bytes(kStages, kStageBytes);

  // What the ring's memory holds once the last block is consumed, in floats.
  static constexpr int kYRow = kBlockN + 8, kSRow = kRank + 8;  // see sum_row
  static constexpr int kY = 0;                                  // own sums of y
  static constexpr int kS = kY + kSkinnyRows * kYRow;           // own sums of s
  static constexpr int kParts = kS + kSkinnyRows * kSRow;       // the same, one for each k16 step
  static constexpr int kTotalS = kParts + kSteps * kSkinnyRows * kSRow;  // the cluster's, scaled
  static constexpr int kTotalY = kTotalS + kSkinnyRows * kSRow;  // the cluster's, own columns
  static constexpr int kUp = kTotalY + kSkinnyRows * kBlockN;    // own rows of lora_b
  static constexpr int kUpRow = kRank + 1;
  static_assert((kUp + kBlockN * kUpRow) * 4 <= kRingBytes);
  static_assert(kStages >= 3 && kStageBytes % kBoxAlignment == 0 && kRankPart % 8 == 0);
};

#if __CUDA_ARCH__ >= 900

// The producer: one thread streams this CTA's k-blocks through the ring.
template <class Tile>
__device__ inline void stream_blocks(const LoraDecodeSm90Params& p, const SkinnyRing<Tile>& ring,
                                     int n0) {
  const int ranks = ptx::cluster_cta_count();
  RingPlace<Tile::kStages> place;
  for (int block = ptx::cluster_cta_rank(); block < p.k_blocks; block += ranks, place.advance()) {
    const uint32_t stage = ring.stage(place.stage), barrier = ring.full(place.stage);
    const int k = block * Tile::kBlockK;
    ptx::mbarrier_wait(ring.empty(place.stage), place.phase ^ 1);
    ptx::mbarrier_arrive_expect(barrier, Tile::kStageBytes);
    ptx::load_box(stage, &p.weight, k, n0, barrier);
    ptx::load_box(stage + Tile::kXOffset, &p.x, k, 0, barrier);
    Tile::Stage::load(stage + Tile::kFactorOffset, &p.lora_a, k, barrier);
  }
}

// The consumers: each warp its columns of W, and its share of s.
template <class Element, class Factor, int kRank>
__device__ inline void multiply_blocks(const LoraDecodeSm90Params& p,
                                       const SkinnyRing<DecodeTile<Factor, kRank>>& ring) {
  using Tile = DecodeTile<Factor, kRank>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int step = warp % Tile::kSteps, first_rank = warp / Tile::kSteps * Tile::kRankPart;
  const int ranks = ptx::cluster_cta_count();
  // 16 further k are 32 further bytes in a row of 128, whose chunks the swizzle permutes by an
  // exclusive or: so do these.
  constexpr int kStepBytes = 16 * 2;
  const uint32_t x_tile = Tile::kXOffset + a_fragment<Tile::kBlockK>(0, 0, lane);
  const uint32_t weight_tile = b_fragment<Tile::kBlockK>(warp * Tile::kWarpColumns, 0, lane);
  float y_acc[Tile::kWarpColumns / 8][4] = {}, s_acc[Tile::kRankPart / 8][4] = {};
  RingPlace<Tile::kStages> place;
#pragma unroll 1
  for (int block = ptx::cluster_cta_rank(); block < p.k_blocks; block += ranks, place.advance()) {
    const unsigned char* factor_tile =
        ring.memory + place.stage * Tile::kStageBytes + Tile::kFactorOffset;
    const uint32_t stage = ring.stage(place.stage);
    ptx::mbarrier_wait(ring.full(place.stage), place.phase);
    uint32_t a[4];
#pragma unroll
    for (int k = 0; k < Tile::kSteps; ++k) {
      uint32_t b[4];
      ptx::ldmatrix_x4(a, (stage + x_tile) ^ (k * kStepBytes));
      ptx::ldmatrix_x4(b, (stage + weight_tile) ^ (k * kStepBytes));
      mma16<Element>(y_acc[0], a, b[0], b[1]);
      mma16<Element>(y_acc[1], a, b[2], b[3]);
    }
    ptx::ldmatrix_x4(a, (stage + x_tile) ^ (step * kStepBytes));
    multiply_factor<Element, Factor, kRank>(s_acc, a, factor_tile, step, first_rank, p.r, lane);
    ring.release(place.stage, lane);
  }
  __syncthreads();  // with the producer: the ring is free
  auto* const sums = reinterpret_cast<float*>(ring.memory);
#pragma unroll
  for (int j = 0; j < Tile::kWarpColumns / 8; ++j)
    store_sums(sums + Tile::kY, Tile::kYRow, warp * Tile::kWarpColumns + j * 8, y_acc[j], lane);
#pragma unroll
  for (int j = 0; j < Tile::kRankPart / 8; ++j)
    store_sums(sums + Tile::kParts + step * kSkinnyRows * Tile::kSRow, Tile::kSRow,
               first_rank + j * 8, s_acc[j], lane);
}

// From the CTAs' sums to s and this CTA's columns of y.
template <class Element, class Factor, int kRank>
__device__ inline void finish_columns(const LoraDecodeSm90Params& p, float* sums, int n0) {
  using Tile = DecodeTile<Factor, kRank>;
  using Traits = ElementTraits<Element>;
  const int columns = Tile::kBlockN / static_cast<int>(ptx::cluster_cta_count());
  const int first = columns * static_cast<int>(ptx::cluster_cta_rank());
  for (int i = threadIdx.x; i < p.m * kRank; i += Tile::kThreads) {
    const int at = i / kRank * Tile::kSRow + i % kRank;
    float sum = sums[Tile::kParts + at];
#pragma unroll
    for (int part = 1; part < Tile::kSteps; ++part)
      sum += sums[Tile::kParts + part * kSkinnyRows * Tile::kSRow + at];
    sums[Tile::kS + at] = sum;
  }
  ptx::cluster_arrive();
  // lora_b's rows arrive while the slowest CTA does.
  for (int i = threadIdx.x; i < columns * p.r; i += Tile::kThreads) {
    const int64_t n = n0 + first + i / p.r;
    if (n >= p.n) break;
    const Factor v = static_cast<const Factor*>(p.lora_b)[n * p.lora_b_stride + i % p.r];
    float value;
    if constexpr (sizeof(Factor) == 2)
      value = Traits::to_float(v);
    else
      value = v;
    sums[Tile::kUp + i / p.r * Tile::kUpRow + i % p.r] = value;
  }
  ptx::cluster_wait();
  for (int i = threadIdx.x; i < p.m * p.r; i += Tile::kThreads) {
    const int at = i / p.r * Tile::kSRow + i % p.r;
    sums[Tile::kTotalS + at] = scaled(add_ranks(sums + Tile::kS + at), p.scaling);
  }
  for (int i = threadIdx.x; i < p.m * columns; i += Tile::kThreads)
    sums[Tile::kTotalY + i] =
        add_ranks(sums + Tile::kY + i / columns * Tile::kYRow + first + i % columns);
  __syncthreads();
  ptx::cluster_arrive();  // this CTA has read its peers' memory
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < p.m * p.r; i += Tile::kThreads)
      p.s[i] = sums[Tile::kTotalS + i / p.r * Tile::kSRow + i % p.r];
  for (int i = threadIdx.x; i < p.m * columns; i += Tile::kThreads) {
    const int row = i / columns, column = i % columns, n = n0 + first + column;
    if (n >= p.n) continue;
    float sum = sums[Tile::kTotalY + i];
    const float* s = sums + Tile::kTotalS + row * Tile::kSRow;
    const float* up = sums + Tile::kUp + column * Tile::kUpRow;
    for (int j = 0; j < p.r; ++j) sum += s[j] * up[j];
    if (p.bias) sum += Traits::to_float(static_cast<const Element*>(p.bias)[n]);
    static_cast<Element*>(p.y)[row * p.y_stride + n] = Traits::from_float(sum);
  }
  ptx::cluster_wait();  // until they have read this one's
}

#endif

template <class Element, class Factor, int kRank>
__global__ void __launch_bounds__(DecodeTile<Factor, kRank>::kThreads, 2)
    lora_decode_sm90_kernel(const __grid_constant__ LoraDecodeSm90Params p) {
#if __CUDA_ARCH__ >= 900
  using Tile = DecodeTile<Factor, kRank>;
  extern __shared__ unsigned char shared[];
  const SkinnyRing<Tile> ring(shared);
  ring.init();
  const int n0 = static_cast<int>(blockIdx.x / ptx::cluster_cta_count()) * Tile::kBlockN;
  if (threadIdx.x < 32 * Tile::kConsumers) {
    multiply_blocks<Element, Factor, kRank>(p, ring);
  } else {
    if (threadIdx.x % 32 == 0) stream_blocks<Tile>(p, ring, n0);
    __syncwarp();
    __syncthreads();
  }
  __syncthreads();
  finish_columns<Element, Factor, kRank>(p, reinterpret_cast<float*>(ring.memory), n0);
#endif
}

}  // namespace fused_peft::cuda
