// Accumulators of the tensor core: registers of C to rows of 8 floats, and back.
#pragma once

#include "simulator/exec/mma_fragments.h"

namespace fused_peft::sim {

// Each has kRegisters, how many hold kRows rows of 8; kPairs, whether a register holds two columns;
// load() from registers c, and store() to registers d (c: of what was loaded).
template <int kRows>
struct F32Accumulator {
  static constexpr int kRegisters = kRows / 4;
  static constexpr bool kPairs = false;
  static void load(const Warp& warp, const Operand* c, float* rows) {
    for (int half = 0; half < kRows / 8; ++half) {
      join_rows(lanes_of<uint32_t>(warp, c[2 * half]), lanes_of<uint32_t>(warp, c[2 * half + 1]),
                rows + 64 * half);
    }
  }
  static void store(Warp& warp, const Operand* d, const Operand*, LaneMask mask, float* rows) {
    for (int i = 0; i < 8 * kRows; ++i) rows[i] = canonical(rows[i]);
    for (int half = 0; half < kRows / 8; ++half) {
      alignas(64) uint32_t even[kLanes], odd[kLanes];
      split_rows(rows + 64 * half, even, odd);
      store_register(warp, d[2 * half], even, mask);
      store_register(warp, d[2 * half + 1], odd, mask);
    }
  }
};

template <int kRows>
struct F16Accumulator {
  static constexpr int kRegisters = kRows / 8;
  static constexpr bool kPairs = true;
  static void load(const Warp& warp, const Operand* c, float* rows) {
    for (int half = 0; half < kRegisters; ++half) {
      F16Lanes::from(lanes_of<uint16_t>(warp, c[half]), rows + 64 * half, 64);
    }
  }
  static void store(Warp& warp, const Operand* d, const Operand*, LaneMask mask,
                    const float* rows) {
    for (int half = 0; half < kRegisters; ++half) {
      alignas(64) uint16_t halves[2 * kLanes];
      F16Lanes::to(rows + 64 * half, halves, 2 * kLanes);
      alignas(64) uint32_t packed[kLanes];
      std::memcpy(packed, halves, sizeof packed);
      store_register(warp, d[half], packed, mask);
    }
  }
};

// The products' sum stays below 2^24 and so is exact as a float; it is added to C as integers.
// Without c: to zero.
template <int kRows, bool kSaturate>
struct S32Accumulator {
  static constexpr int kRegisters = kRows / 4;
  static constexpr bool kPairs = false;
  static void load(const Warp&, const Operand*, float* rows) {
    std::memset(rows, 0, sizeof(float) * 8 * kRows);
  }
  static void store(Warp& warp, const Operand* d, const Operand* c, LaneMask mask, float* rows) {
    for (int half = 0; half < kRows / 8; ++half) {
      alignas(64) uint32_t sums[2][kLanes];
      split_rows(rows + 64 * half, sums[0], sums[1]);
      for (int j = 0; j < 2; ++j) {
        const auto* addend = c != nullptr ? lanes_of<int32_t>(warp, c[2 * half + j]) : nullptr;
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t sum =
              int64_t{addend != nullptr ? addend[lane] : 0} + int32_t(float_of(sums[j][lane]));
          sums[j][lane] = kSaturate ? uint32_t(clamp_to_s32(sum)) : uint32_t(sum);
        }
        store_register(warp, d[2 * half + j], sums[j], mask);
      }
    }
  }
};

}  // namespace fused_peft::sim
