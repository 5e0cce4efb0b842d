// Handlers of elementwise instructions from a function of one lane.
//
// All 32 lanes are computed into a buffer (so the loop vectorises) and the lanes of the mask
// stored; the function must therefore bear any input (no trap on a division by zero).
#pragma once

#include <tuple>
#include <utility>

#include "simulator/core/warp.h"

namespace fused_peft::sim {

template <class T>
inline void store_lanes(T* dest, const T* values, LaneMask mask) {
  if (mask == kFullMask) {
    std::memcpy(dest, values, sizeof(T) * kLanes);
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    dest[lane] = (mask >> lane & 1) ? values[lane] : dest[lane];
  }
}

// Handler for dest = Op()(source 0, source 1, ...), every operand of its own element type.
template <class Op, class D, class... S>
Step elementwise(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) D out[kLanes];
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    const std::tuple<const S*...> sources{lanes_of<S>(warp, instr.source(int(I)))...};
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = Op()(std::get<I>(sources)[lane]...);
  }(std::index_sequence_for<S...>());
  store_lanes(dest_lanes<D>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

}  // namespace fused_peft::sim
