// The loop that executes instructions of one warp, and what a worker thread keeps for it.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator/core/cta.h"

namespace fused_peft::sim {

// Registers of every instruction whose destinations take the validity of its sources (the loop's
// part of initcheck): for instruction i, the sources and then the destinations from
// registers[first[i]] on.
struct ValidityPlan {
  struct Entry {
    uint32_t first = 0;
    uint16_t sources = 0;
    uint16_t dests = 0;
  };
  std::vector<Entry> entries;
  std::vector<uint32_t> registers;

  explicit ValidityPlan(const Program& program);
};

struct InstrCount {
  uint64_t warps = 0;
  uint64_t lanes = 0;
};

enum class SliceEnd : uint8_t {
  kSpent,    // the slice is over
  kYielded,  // the warp asks for others to run
  kBlocked,  // no lane of the warp can go on
  kDone,     // all lanes have exited
};

// Executes up to `length` instructions of the warp; *executed grows by their number. `forced` makes
// a split run that is not the furthest behind, so that one that spins cannot starve the others.
// plan is nullptr where initcheck is off.
SliceEnd run_slice(Warp& warp, const ValidityPlan* plan, InstrCount* counts, uint32_t length,
                   bool forced, uint64_t* executed);

}  // namespace fused_peft::sim
