#include "simulator/exec/run_warp.h"

#include <bit>
#include <cstring>

#include "simulator/check/checker.h"

namespace fused_peft::sim {
namespace {

// Two splits at one pc become one. A split that waits for its warp's other lanes tries again with
// them.
bool can_merge(const Split& split) {
  return split.wait == Wait::kNone ? !split.arrived : split.wait == Wait::kConverge;
}

void merge_at_current(Warp& warp) {
  for (size_t i = 0; i < warp.others.size();) {
    Split& other = warp.others[i];
    if (other.pc != warp.current.pc || !can_merge(other)) {
      ++i;
      continue;
    }
    warp.current.mask |= other.mask;
    other = warp.others.back();
    warp.others.pop_back();
    warp.diverged_for = 0;
    warp.stuck = false;
  }
}

// Makes others[i] the current split.
void select(Warp& warp, size_t i) {
  if (warp.current.mask != 0) {
    std::swap(warp.current, warp.others[i]);
  } else {
    warp.current = warp.others[i];
    warp.others.erase(warp.others.begin() + std::ptrdiff_t(i));
  }
  if (can_merge(warp.current)) merge_at_current(warp);
}

constexpr size_t kNobody = ~size_t{0};

// The split furthest behind of those that wait like this.
size_t furthest_behind(const Warp& warp, Wait wait) {
  size_t best = kNobody;
  for (size_t i = 0; i < warp.others.size(); ++i) {
    const Split& split = warp.others[i];
    if (split.wait == wait && (best == kNobody || split.pc < warp.others[best].pc)) best = i;
  }
  return best;
}

bool runs(const Split& split) { return split.mask != 0 && split.wait == Wait::kNone; }

// Gives the warp a current split that can run; false if there is none.
bool choose_split(Warp& warp) {
  const size_t i = furthest_behind(warp, Wait::kNone);
  if (runs(warp.current)) {
    if (i != kNobody && warp.others[i].pc < warp.current.pc) select(warp, i);
    return true;
  }
  if (i == kNobody) return false;
  select(warp, i);
  return true;
}

// Another split than the current one, where one can run.
void force_other(Warp& warp) {
  size_t candidates = 0;
  for (const Split& split : warp.others) candidates += split.wait == Wait::kNone;
  if (candidates == 0) return;
  // The longest waiting one: select() puts the current one into its place, so rotate to be fair.
  for (size_t i = 0; i < warp.others.size(); ++i) {
    if (warp.others[i].wait != Wait::kNone) continue;
    Split next = warp.others[i];
    warp.others.erase(warp.others.begin() + std::ptrdiff_t(i));
    if (warp.current.mask != 0) warp.others.push_back(warp.current);
    warp.current = next;
    if (can_merge(warp.current)) merge_at_current(warp);
    return;
  }
}

// Splits that poll get one try; then, where all wait for lanes of their own warp, nobody from
// outside can help: barriers are told to make do with the lanes there are.
bool begin_slice(Warp& warp, bool forced) {
  warp.retry(Wait::kPoll);
  if (choose_split(warp)) {
    if (forced) force_other(warp);
    return true;
  }
  if (warp.stuck) return false;
  bool all_converge = warp.current.mask == 0 || warp.current.wait == Wait::kConverge;
  for (const Split& split : warp.others) all_converge &= split.wait == Wait::kConverge;
  if (!all_converge) return false;
  warp.stuck = true;
  warp.retry(Wait::kConverge);
  return choose_split(warp);
}

// A predicate that was computed from uninitialised data decides what happens.
void report_guard(Warp& warp, const Instr& instr, LaneMask lanes, const ValidityPlan::Entry& entry,
                  const uint32_t* registers) {
  if (instr.num_dests == 0 || (instr.flags & kOwnValidity)) {
    warp.cta->launch->checker->report(warp, instr, lanes, FindingKind::kUninitialised,
                                      "its predicate depends on uninitialised data");
  }
  for (int i = 0; i < entry.dests; ++i) warp.valid[registers[entry.sources + i]] &= ~lanes;
}

inline void propagate(LaneMask* valid, const ValidityPlan::Entry& entry, const uint32_t* registers,
                      LaneMask mask) {
  LaneMask all = kFullMask;
  for (int i = 0; i < entry.sources; ++i) all &= valid[registers[i]];
  const uint32_t* dests = registers + entry.sources;
  for (int i = 0; i < entry.dests; ++i) {
    valid[dests[i]] = (valid[dests[i]] & ~mask) | (all & mask);
  }
}

// How much closer an instruction brings the other lanes to their turn: loops around atomics and
// loads may be waiting for them.
uint32_t impatience(InstrClass kind) {
  return kind == InstrClass::kAtomic ? 128 : kind == InstrClass::kLoad ? 8 : 1;
}

// After the current split has moved while others exist. False: no split can run.
inline bool reconverge(Warp& warp, const Instr& instr, bool forced) {
  if (warp.current.mask != 0) merge_at_current(warp);
  warp.diverged_for += impatience(instr.kind);
  if (forced && runs(warp.current)) return true;
  return choose_split(warp);
}

// The current split waits: keeps only the lanes that do.
void block(Warp& warp, LaneMask mask) {
  if (warp.current.mask & ~mask) warp.detach_others(mask);
  if (warp.current.wait == Wait::kNone) warp.current.wait = Wait::kPoll;
}

template <bool kInitcheck>
SliceEnd slice(Warp& warp, const ValidityPlan* plan, InstrCount* counts, uint32_t length,
               bool forced, uint64_t* executed) {
  if (!begin_slice(warp, forced)) return SliceEnd::kBlocked;
  const Instr* const code = warp.program->code.data();
  const std::byte* const frame = warp.bases[0];
  uint32_t left = length;
  SliceEnd end = SliceEnd::kSpent;
  while (left != 0) {
    const uint32_t pc = warp.current.pc;
    const Instr& instr = code[pc];
    LaneMask mask = warp.current.mask;
    --left;
    if (instr.guard != kNoRegister) {
      LaneMask guard;
      std::memcpy(&guard, frame + instr.guard, sizeof guard);
      if constexpr (kInitcheck) {
        const LaneMask doubtful = mask & ~warp.valid[instr.guard_reg];
        if (doubtful) [[unlikely]] {
          const auto& entry = plan->entries[pc];
          report_guard(warp, instr, doubtful, entry, plan->registers.data() + entry.first);
        }
      }
      mask &= instr.guard_negated ? ~guard : guard;
    }
    if (mask != 0) {
      counts[pc].warps += 1;
      counts[pc].lanes += uint32_t(std::popcount(mask));
      if constexpr (kInitcheck) {
        const auto& entry = plan->entries[pc];
        if (entry.dests) propagate(warp.valid, entry, plan->registers.data() + entry.first, mask);
      }
      const Step step = instr.run(warp, instr, mask);
      if (step == Step::kNext) [[likely]] {
        ++warp.current.pc;
      } else if (step == Step::kYield) {
        ++warp.current.pc;
        end = SliceEnd::kYielded;
      } else if (step == Step::kBlock) {
        ++left;
        counts[pc].warps -= 1;
        counts[pc].lanes -= uint32_t(std::popcount(mask));
        block(warp, mask);
        if (!choose_split(warp)) {
          end = SliceEnd::kBlocked;
          break;
        }
        continue;
      } else if (warp.current.mask == 0) {
        if (warp.others.empty()) {
          end = SliceEnd::kDone;
          break;
        }
      }
      if (warp.current.arrived) [[unlikely]] {
        warp.current.arrived = false;
        warp.current.token = 0;
      }
    } else {
      ++warp.current.pc;
    }
    if (!warp.others.empty()) [[unlikely]] {
      if (!reconverge(warp, instr, forced)) {
        end = SliceEnd::kBlocked;
        break;
      }
    }
    if (end != SliceEnd::kSpent) [[unlikely]]
      break;
  }
  *executed += length - left;
  warp.instructions += length - left;
  return end;
}

}  // namespace

ValidityPlan::ValidityPlan(const Program& program) {
  entries.reserve(program.code.size());
  for (const Instr& instr : program.code) {
    Entry entry;
    entry.first = uint32_t(registers.size());
    if (!(instr.flags & kOwnValidity) && instr.num_dests != 0) {
      if (instr.guard_reg != kNoRegister) registers.push_back(instr.guard_reg);
      for (int i = 0; i < instr.num_sources; ++i) {
        if (instr.source(i).reg != kNoRegister) registers.push_back(instr.source(i).reg);
      }
      entry.sources = uint16_t(registers.size() - entry.first);
      for (int i = 0; i < instr.num_dests; ++i) {
        if (instr.dest(i).reg != kNoRegister) registers.push_back(instr.dest(i).reg);
      }
      entry.dests = uint16_t(registers.size() - entry.first - entry.sources);
    }
    entries.push_back(entry);
  }
}

SliceEnd run_slice(Warp& warp, const ValidityPlan* plan, InstrCount* counts, uint32_t length,
                   bool forced, uint64_t* executed) {
  return plan ? slice<true>(warp, plan, counts, length, forced, executed)
              : slice<false>(warp, plan, counts, length, forced, executed);
}

}  // namespace fused_peft::sim
