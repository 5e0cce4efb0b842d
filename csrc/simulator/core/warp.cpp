#include "simulator/core/warp.h"

namespace fused_peft::sim {

void Warp::detach_others(LaneMask lanes) {
  const LaneMask rest = current.mask & ~lanes;
  current.mask &= lanes;
  if (rest == 0) return;
  others.push_back({.pc = current.pc + 1, .mask = rest});
  diverged_for = 0;
}

void Warp::branch(LaneMask lanes, uint32_t target) {
  const uint32_t behind = current.pc + 1;
  const LaneMask rest = current.mask & ~lanes;
  if (rest == 0 || lanes == 0) {
    current.pc = lanes == 0 ? behind : target;
    return;
  }
  // Lanes that are behind go first, so that the others can wait for them at the point of
  // reconvergence.
  Split taken{.pc = target, .mask = lanes};
  Split fallen{.pc = behind, .mask = rest};
  const bool taken_first = target < behind;
  current = taken_first ? taken : fallen;
  others.push_back(taken_first ? fallen : taken);
  diverged_for = 0;
}

void Warp::exit_lanes(LaneMask lanes, uint32_t pc) {
  exited |= lanes;
  current.mask &= ~lanes;
  current.pc = pc;
  diverged_for = 0;
  retry(Wait::kConverge);
}

void Warp::retry(Wait wait) {
  const auto free = [wait](Split& split) {
    if (split.wait != wait) return;
    split.wait = Wait::kNone;
    split.waits_for = nullptr;
  };
  free(current);
  for (Split& split : others) free(split);
}

}  // namespace fused_peft::sim
