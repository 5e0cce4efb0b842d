// What a CUtensorMap holds in the simulator: its 128 bytes are opaque to programs.
#pragma once

#include <cstdint>

#include "simulator/core/types.h"

namespace fused_peft::sim {

constexpr uint64_t kMapAlign = 64;

struct TensorMap {
  static constexpr uint32_t kMagic = 0x70616d54;  // "Tmap"
  static constexpr int kMaxRank = 5;

  uint32_t magic = 0;
  uint8_t rank = 0;
  uint8_t element_bytes = 0;
  Type type = Type::kNone;
  uint8_t swizzle_bytes = 0;  // 0, 32, 64, 128
  uint64_t address = 0;
  uint64_t dims[kMaxRank] = {};         // elements, the innermost dimension first
  uint64_t strides[kMaxRank - 1] = {};  // bytes, of dimensions 1 ...
  uint16_t box[kMaxRank] = {};          // elements
  uint8_t element_strides[kMaxRank] = {};
  bool fill_with_nan = false;  // what lies outside of the tensor; else zeros
};
static_assert(sizeof(TensorMap) <= 128);

// Where the 16 bytes of a box at `offset` in shared memory lie once they are swizzled (PTX
// ISA 5.5.6).
inline uint64_t swizzled(uint64_t offset, uint32_t swizzle_bytes) {
  return swizzle_bytes == 0 ? offset : offset ^ ((offset >> 7 & (swizzle_bytes / 16 - 1)) << 4);
}

}  // namespace fused_peft::sim
