// Boolean operations on predicates, of which a lane is a bit.
#pragma once

#include <array>

#include "simulator/core/decoder.h"
#include "simulator/core/validity.h"

namespace fused_peft::sim {

enum class BoolOp : uint8_t { kNone, kAnd, kOr, kXor };

// A predicate's lanes, and which of them are known (computed from initialised data).
struct PredicateLanes {
  LaneMask value;
  LaneMask valid;
};

// False and unknown is a known false, true or unknown a known true.
inline PredicateLanes combine(BoolOp op, PredicateLanes a, PredicateLanes b) {
  const LaneMask both = a.valid & b.valid;
  switch (op) {
    case BoolOp::kAnd:
      return {a.value & b.value, both | (a.valid & ~a.value) | (b.valid & ~b.value)};
    case BoolOp::kOr: return {a.value | b.value, both | (a.valid & a.value) | (b.valid & b.value)};
    case BoolOp::kXor: return {a.value ^ b.value, both};
    case BoolOp::kNone: break;
  }
  return a;
}

inline PredicateLanes predicate_lanes(const Warp& warp, const Operand& operand) {
  return {predicate(warp, operand), valid_lanes(warp, operand)};
}

// Bit of each lane, for loops that vectorise.
alignas(64) inline constexpr auto kLaneBits = [] {
  std::array<uint32_t, kLanes> bits{};
  for (int lane = 0; lane < kLanes; ++lane) bits[size_t(lane)] = 1u << lane;
  return bits;
}();

inline BoolOp take_bool_op(Decoding& d) {
  const std::string_view text = d.take_one({".and", ".or", ".xor"});
  if (text == ".and") return BoolOp::kAnd;
  if (text == ".or") return BoolOp::kOr;
  return text == ".xor" ? BoolOp::kXor : BoolOp::kNone;
}

}  // namespace fused_peft::sim
