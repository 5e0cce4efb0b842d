// Copies that run beside a warp: cp.async and its groups.
#pragma once

#include <array>
#include <deque>
#include <memory>

#include "simulator/core/warp.h"

namespace fused_peft::sim {

// One cp.async of a warp, from its issue to the wait that completes its group.
struct AsyncCopy {
  const Instr* instr = nullptr;
  LaneMask lanes = 0;    // not completed yet
  LaneMask landed = 0;   // whose data is in shared memory already
  LaneMask partial = 0;  // with zeros behind the bytes from global memory
  LaneMask initialised = 0;
  uint32_t bytes = 0;  // of one lane in shared memory
  uint64_t group = 0;  // of these lanes
  std::array<uint64_t, kLanes> to;
  std::array<const std::byte*, kLanes> from;
  std::array<uint8_t, kLanes> filled;  // bytes from global memory; zeros behind them
};

// Warp::async.
struct WarpAsync {
  std::deque<AsyncCopy> copies;              // in the order of their issue
  std::array<uint64_t, kLanes> committed{};  // groups of each lane
  uint64_t issued = 0;
  std::shared_ptr<void> bulk;  // bulk copies' own
};

inline WarpAsync& async_of(Warp& warp) {
  if (warp.async == nullptr) warp.async = std::make_shared<WarpAsync>();
  return *static_cast<WarpAsync*>(warp.async.get());
}

// Every cp.async that these lanes have issued lands now.
void complete_async_copies(Warp& warp, LaneMask lanes);

}  // namespace fused_peft::sim
