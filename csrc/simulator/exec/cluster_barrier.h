// barrier.cluster (PTX ISA 9.7.13.4).
#pragma once

#include <string>

#include "simulator/core/decoder.h"
#include "simulator/core/warp.h"

namespace fused_peft::sim {

void decode_cluster_barrier(Decoding& decoding);
void cluster_after_exit(Warp& warp, LaneMask lanes);
std::string describe_cluster_barrier(const Warp& warp, const Split& split);

}  // namespace fused_peft::sim
