// bar, barrier and barrier.cluster.
#pragma once

#include <string>

#include "simulator/core/cta.h"

namespace fused_peft::sim {

// Lanes of the warp have exited: barriers that waited for them may be complete.
void barriers_after_exit(Warp& warp, LaneMask lanes);

// What a split at this instruction waits for, with the figures of the barrier: "" for other
// instructions.
std::string describe_barrier(const Warp& warp, const Split& split);

}  // namespace fused_peft::sim
