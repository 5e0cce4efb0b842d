// Shared-memory matrix descriptors of wgmma (PTX ISA, "Matrix descriptor format"), and the
// addresses of a matrix's 16-byte chunks in the canonical layouts.
#pragma once

#include <cstdint>

namespace fused_peft::sim {

class MatrixDescriptor {
 public:
  explicit MatrixDescriptor(uint64_t bits)
      : start_(field(bits, 0)),
        leading_(field(bits, 16)),
        stride_(field(bits, 32)),
        base_offset_(uint32_t(bits >> 49 & 7)) {
    constexpr uint32_t kSwizzleBytes[] = {16, 128, 64, 32};
    width_ = kSwizzleBytes[bits >> 62];
  }

  uint32_t base_offset() const { return base_offset_; }

  // K-major: chunk 0 or 1 of the 32 bytes that row `row` has along k.
  uint32_t chunk_of_row(uint32_t row, uint32_t chunk) const {
    const uint32_t next = width_ == 16 ? leading_ : 16;
    return swizzled(start_ + row % 8 * width_ + row / 8 * stride_ + chunk * next);
  }
  // MN-major: the 8 elements of rows 8 * group ... at position k.
  uint32_t chunk_of_k(uint32_t k, uint32_t group) const {
    const uint32_t groups = width_ / 16;  // side by side in one repetition of the pattern
    const uint32_t next_group = width_ == 16 ? stride_ : leading_,
                   next_k = width_ == 16 ? leading_ : stride_;
    return swizzled(start_ + group % groups * 16 + group / groups * next_group + k % 8 * width_ +
                    k / 8 * next_k);
  }

 private:
  static uint32_t field(uint64_t bits, unsigned at) { return uint32_t(bits >> at & 0x3fff) << 4; }

  // Address bits 4 and up are changed by bits 7 and up, as many as it takes to tell a pattern's
  // chunks apart.
  uint32_t swizzled(uint32_t address) const { return address ^ (address >> 3 & (width_ - 16)); }

  uint32_t start_, leading_, stride_, base_offset_, width_;
};

}  // namespace fused_peft::sim
