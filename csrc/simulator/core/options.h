// How a launch is run: schedule, timing of asynchronous copies, checks.
#pragma once

#include <cstdint>

namespace fused_peft::sim {

// When data of an asynchronous copy lands: at its issue, at the wait that asks for it, or in
// between.
enum class AsyncTiming : uint8_t { kEarly, kLate, kRandom };

struct Options {
  uint64_t seed = 0;  // of the order of warps and CTAs, and of AsyncTiming::kRandom
  AsyncTiming async_timing = AsyncTiming::kRandom;
  bool memcheck = true;
  bool initcheck = true;
  bool racecheck = true;
  bool synccheck = true;
  uint32_t max_sms = 0;  // 0: the device's own number. Few SMs put more CTAs after one another
  uint32_t max_findings = 100;  // kept per launch; the rest are counted
  uint32_t threads = 1;         // worker threads; results do not depend on it, the schedule does
  // Warp instructions without a barrier passed, an exit or a store by anyone before a launch counts
  // as hung.
  uint64_t hang_budget = 200'000'000;
};

}  // namespace fused_peft::sim
