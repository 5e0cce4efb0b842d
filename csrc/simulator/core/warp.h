// A warp of 32 lanes: its registers, program counters and what it waits for.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "simulator/core/program.h"

namespace fused_peft::sim {

class Cta;

// What lets a split that cannot go on try its instruction again.
enum class Wait : uint8_t {
  kNone,      // it can run
  kPoll,      // tried again whenever the scheduler comes by (the default of Step::kBlock)
  kConverge,  // lanes of its own warp: tried again when some of them reach the same pc, or exit
  kEvent,     // another warp will call wake()
};

// Lanes of a diverged warp that share a program counter.
struct Split {
  uint32_t pc = 0;
  LaneMask mask = 0;
  bool arrived = false;  // at the blocking instruction at pc: its first execution has been counted
  Wait wait = Wait::kNone;
  uint64_t token = 0;               // the handler's own note about that (a barrier's generation)
  const char* waits_for = nullptr;  // for the deadlock report, in words; nullptr while it can run
};

class Warp {
 public:
  const Program* program = nullptr;
  Cta* cta = nullptr;
  uint32_t index = 0;             // in its CTA
  uint64_t uid = 0;               // in the launch: linear CTA * warps per CTA + index
  LaneMask existing = kFullMask;  // lanes that have a thread (the last warp may be partial)
  LaneMask exited = 0;

  // bases[0]: this warp's frame; bases[1]: the program's constants.
  std::array<std::byte*, 2> bases{};
  // By register: lanes whose value was computed from initialised data only. Kept when initcheck is
  // on.
  LaneMask* valid = nullptr;
  std::byte* local = nullptr;  // lane l's .local variables at local + l * program->local_bytes
  std::byte* private_memory =
      nullptr;  // lane l's callee parameters at + l * program->private_bytes

  // The split that runs now, and those that wait. All masks are disjoint; together with `exited`
  // they make `existing`.
  Split current;
  std::vector<Split> others;

  uint64_t instructions = 0;     // executed so far
  uint32_t diverged_for = 0;     // instructions since its splits last changed
  bool is_ready = false;         // in Cta::ready
  bool yielded = false;          // at its last slice
  LaneMask cluster_arrived = 0;  // lanes between barrier.cluster.arrive and wait
  LaneMask cluster_odd = 0;      // of those: the parity of the generation they arrived at
  uint32_t registers = 0;        // per thread, as setmaxnreg left it
  bool stuck = false;  // no split of it can run and all wait: aligned barriers make do with a part
  void* check = nullptr;        // the sanitizers' own state of this warp
  std::shared_ptr<void> async;  // cp.async and bulk groups of this warp's lanes
  std::shared_ptr<void> wgmma;  // wgmma operations that it has issued and not waited for

  bool done() const { return exited == existing; }
  LaneMask alive() const { return existing & ~exited; }

  // Leaves the instruction at current.pc to `lanes` (of current.mask) alone: the others go on
  // behind it as a split of their own.
  void detach_others(LaneMask lanes);
  // Sends `lanes` of the current split to `target`, the rest to the instruction behind.
  void branch(LaneMask lanes, uint32_t target);
  // Ends these lanes of the current split. What is left of it, if anything, is at `pc`.
  void exit_lanes(LaneMask lanes, uint32_t pc);
  // Makes the splits that wait like this runnable again, at their instruction.
  void retry(Wait wait);
};

// The 32 elements of an operand. The builder has made sure that its width is sizeof(T).
template <class T>
inline const T* lanes_of(const Warp& warp, const Operand& operand) {
  return reinterpret_cast<const T*>(warp.bases[operand.space] + operand.offset);
}
template <class T>
inline T* dest_lanes(Warp& warp, const Operand& operand) {
  return reinterpret_cast<T*>(warp.bases[0] + operand.offset);
}
// A predicate operand's lanes, negation applied.
inline LaneMask predicate(const Warp& warp, const Operand& operand) {
  LaneMask mask;
  std::memcpy(&mask, warp.bases[operand.space] + operand.offset, sizeof mask);
  return operand.negated ? ~mask : mask;
}
inline void set_predicate(Warp& warp, const Operand& operand, LaneMask lanes, LaneMask value) {
  auto* p = reinterpret_cast<LaneMask*>(warp.bases[0] + operand.offset);
  *p = (*p & ~lanes) | (value & lanes);
}

}  // namespace fused_peft::sim
