// Warp::valid for handlers that keep it themselves (kOwnValidity).
#pragma once

#include "simulator/core/warp.h"

namespace fused_peft::sim {

// Lanes of the operand that were computed from initialised data; all of them where nobody keeps
// count.
inline LaneMask valid_lanes(const Warp& warp, const Operand& operand) {
  return warp.valid != nullptr && operand.reg != kNoRegister ? warp.valid[operand.reg] : kFullMask;
}

inline void set_valid(Warp& warp, const Operand& dest, LaneMask lanes, LaneMask valid) {
  if (warp.valid == nullptr || dest.reg == kNoRegister) return;
  LaneMask& current = warp.valid[dest.reg];
  current = (current & ~lanes) | (valid & lanes);
}

}  // namespace fused_peft::sim
