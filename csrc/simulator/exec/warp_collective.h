// What instructions have in common that need the lanes of their membermask together.
#pragma once

#include <bit>

#include "simulator/check/checker.h"
#include "simulator/core/decoder.h"
#include "simulator/core/warp.h"

namespace fused_peft::sim {

// bar.warp.sync, with the qualifiers taken.
void decode_warp_barrier(Decoding& decoding);

void report_not_member(Warp& warp, const Instr& instr, LaneMask lanes);

// Runs op(lanes) once for every group of lanes that name the same members and are all there; lanes
// that have exited are not waited for. The other groups wait at this instruction until the rest of
// their members reach it.
template <class Op>
Step collective(Warp& warp, const Instr& instr, LaneMask mask, const Operand& members, Op op) {
  const uint32_t* member = lanes_of<uint32_t>(warp, members);
  LaneMask left = mask, ready = 0;
  while (left != 0) {
    const uint32_t named = member[std::countr_zero(left)];
    LaneMask group = left;
    if (members.space == 0) {
      group = 0;
      for (int lane = 0; lane < kLanes; ++lane) group |= LaneMask(member[lane] == named) << lane;
      group &= left;
    }
    left &= ~group;
    if (group & ~named) [[unlikely]]
      report_not_member(warp, instr, group & ~named);
    if (named & warp.alive() & ~group) continue;
    op(group);
    warp.cta->launch->checker->synchronised_lanes(warp, group);
    ready |= group;
  }
  if (ready == mask) [[likely]]
    return Step::kNext;
  if (ready != 0) warp.detach_others(mask & ~ready);
  warp.current.wait = Wait::kConverge;
  warp.current.waits_for = "lanes of its membermask";
  return Step::kBlock;
}

}  // namespace fused_peft::sim
