// A matrix of R columns as the second operand of the sm_90 backward passes: ds beside x, lora_b and
// s beside dy. What TMA fills in its stages, and the products with it.
#pragma once

#include "kernels/cuda/skinny_sm90.cuh"

namespace fused_peft::cuda {

constexpr int kSkinnyBlockRows = 64;  // rows of a stage

// kSkinnyBlockRows rows in panels whose rows are 128 bytes, swizzled as tile_offset<64> is: one of
// 64 columns, in float32 of 32 each. Columns beyond R are zeros that TMA fills in, in shared memory
// alone.
template <class Factor, int kRank>
struct NarrowStage {
  static constexpr int kPanelColumns = 128 / int{sizeof(Factor)};
  static constexpr int kPanels = (kRank + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytes = kSkinnyBlockRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;

#if __CUDA_ARCH__ >= 900
  __device__ static void load(uint32_t stage, const CUtensorMap* map, int row, uint32_t barrier) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::load_box(stage + panel * kPanelBytes, map, panel * kPanelColumns, row, barrier);
  }
#endif
};

#if __CUDA_ARCH__ >= 900

// acc[i][j] += a[i] (16 x 16 fragments, one below the other) times rows k .. k + 15, columns
// first + 8 j .. of such a matrix.
template <class Element, class Factor, int kRank, int kFragments, int kBlocks>
__device__ inline void multiply_narrow_stage(float (&acc)[kFragments][kBlocks][4],
                                             const uint32_t (&a)[kFragments][4],
                                             const unsigned char* tile, int k, int first, int r,
                                             int lane) {
  // 16 or 8 further columns are 32 further bytes in a row of 128, whose chunks the swizzle permutes
  // by an exclusive or: so do these.
  if constexpr (sizeof(Factor) == 2) {
    const uint32_t rows = ptx::shared_address(tile) + b_fragment_trans<64>(0, k, lane);
#pragma unroll
    for (int pair = 0; pair < kBlocks / 2; ++pair) {
      const int column = first + pair * 16;
      if ((pair > 0 || kBlocks * 8 < kRank) && column >= r) break;
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, rows ^ (column * 2));
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        mma16<Element>(acc[i][2 * pair], a[i], b[0], b[1]);
        mma16<Element>(acc[i][2 * pair + 1], a[i], b[2], b[3]);
      }
    }
  } else {
    using Stage = NarrowStage<Factor, kRank>;
    const int row = k + lane % 4 * 2;
    const uint32_t even = tile_offset<64>(row, lane / 16) + lane / 4 % 4 * 4;
    const uint32_t odd = tile_offset<64>(row + 1, lane / 16) + lane / 4 % 4 * 4;
    constexpr int kEightRows = 8 * 128;  // the swizzle's period
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const int column = first + j * 8;
      if ((j > 0 || kBlocks * 8 < kRank) && column >= r) break;
      const unsigned char* panel = tile + column / Stage::kPanelColumns * Stage::kPanelBytes;
      const int chunks = column % Stage::kPanelColumns * 4;
      const auto* b0 = reinterpret_cast<const float*>(panel + (even ^ chunks));
      const auto* b1 = reinterpret_cast<const float*>(panel + (odd ^ chunks));
      const FloatTerms b({b0[0], b1[0]}, {b0[kEightRows / 4], b1[kEightRows / 4]});
#pragma unroll
      for (int i = 0; i < kFragments; ++i) mma16_float_b<Element>(acc[i][j], a[i], b);
    }
  }
}

#endif

}  // namespace fused_peft::cuda
