// What a launch did, in numbers.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "simulator/core/program.h"

namespace fused_peft::sim {

struct LineConflicts {
  std::string source;  // "k.cu:12"
  std::string instruction;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;
};

struct Counters {
  std::string kernel;
  uint64_t launches = 1;
  uint64_t warp_instructions = 0, thread_instructions = 0;
  std::array<uint64_t, int(InstrClass::kCount)> by_class{};  // warp instructions
  uint64_t tensor_flop = 0;                                  // 2 m n k of each mma and wgmma
  uint64_t global_load_bytes = 0, global_store_bytes = 0,
           global_atomic_bytes = 0;  // asked for by lanes
  uint64_t global_load_sectors = 0,
           global_store_sectors = 0;  // 32-byte sectors, per warp instruction
  uint64_t global_unique_load_bytes = 0,
           global_unique_store_bytes = 0;  // of the launch, each byte once
  uint64_t shared_load_bytes = 0, shared_store_bytes = 0;
  uint64_t shared_wavefronts = 0,
           shared_ideal_wavefronts = 0;  // their difference is bank conflicts
  uint64_t local_load_bytes = 0, local_store_bytes = 0;
  uint64_t barriers = 0;                 // bar.sync passed, per CTA
  double seconds = 0;                    // of this process, not of any GPU
  std::vector<LineConflicts> conflicts;  // where wavefronts exceed the ideal
};

}  // namespace fused_peft::sim
