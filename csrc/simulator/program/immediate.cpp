#include "simulator/program/immediate.h"

#include <bit>

namespace fused_peft::sim {

bool immediate_bits(bool is_float, bool is_single, uint64_t bits, Type type, uint64_t* out) {
  const bool wants_float =
      type == Type::kF32 || type == Type::kF64 || type == Type::kF16 || type == Type::kBF16;
  if (!is_float) {
    if (wants_float) return false;
    const int width = bytes_of(type);
    if (type == Type::kPred) {
      *out = bits != 0;
    } else {
      *out = width < 8 ? bits & ((uint64_t{1} << (8 * width)) - 1) : bits;
    }
    return true;
  }
  const int width = bytes_of(type);
  if (width == 4) {
    // The pattern of a 0f is kept, NaN payload and all.
    *out = is_single ? bits & 0xffffffffu
                     : std::bit_cast<uint32_t>(float(std::bit_cast<double>(bits)));
    return true;
  }
  if (width != 8 || (is_single && !wants_float)) return false;
  *out = is_single ? std::bit_cast<uint64_t>(double(std::bit_cast<float>(uint32_t(bits)))) : bits;
  return true;
}

}  // namespace fused_peft::sim
