// bar{.cta} and barrier{.cta}: sync, arrive, red (PTX ISA 9.7.13.1).
#include "simulator/exec/barrier.h"

#include <bit>

#include "simulator/check/checker.h"
#include "simulator/exec/cluster_barrier.h"
#include "simulator/exec/families.h"
#include "simulator/exec/warp_collective.h"

namespace fused_peft::sim {
namespace {

enum class Action : uint8_t { kSync, kArrive, kRedPopc, kRedAnd, kRedOr };

// Instr::variant: the action, and these.
constexpr uint32_t kAligned = 8;
constexpr uint32_t kHasCount = 16;
constexpr uint32_t kActionBits = 7;

constexpr uint64_t kTokenBarrierShift = 56;

Action action_of(const Instr& instr) { return Action(instr.variant & kActionBits); }
bool is_reduction(Action action) { return action >= Action::kRedPopc; }

uint32_t uniform_operand(const Warp& warp, const Instr& instr, int source, LaneMask mask) {
  return lanes_of<uint32_t>(warp, instr.source(source))[std::countr_zero(mask)];
}

void finding(Warp& warp, const Instr& instr, LaneMask lanes, FindingKind kind,
             const std::string& detail) {
  Launch& launch = *warp.cta->launch;
  if (launch.options.synccheck) launch.checker->report(warp, instr, lanes, kind, detail);
}

uint64_t token_of(const Cta& cta, const NamedBarrier& barrier) {
  return uint64_t(&barrier - cta.barriers + 1) << kTokenBarrierShift | barrier.generation;
}

// Knowledge passes: all warps that waited know what all that arrived knew.
void synchronise(Cta& cta, NamedBarrier& barrier) {
  Checker& checker = *cta.launch->checker;
  std::vector<Warp*> waiters;
  const uint64_t token = token_of(cta, barrier);
  for (Warp& warp : cta.warps) {
    if (!barrier.has_arrived[warp.index] || warp.done()) continue;
    bool waits = warp.current.arrived && warp.current.token == token;
    for (const Split& split : warp.others) waits |= split.arrived && split.token == token;
    if (waits) waiters.push_back(&warp);
  }
  if (!barrier.clock) {
    checker.rendezvous(waiters);
    return;
  }
  SyncVar variable{barrier.clock};
  for (Warp* warp : waiters) checker.release(*warp, variable);
  for (Warp* warp : waiters) checker.acquire(*warp, variable);
  checker.drop(variable);
  barrier.clock = nullptr;
}

void wake_waiters(Cta& cta, uint64_t token) {
  for (Warp& warp : cta.warps) {
    bool woken = false;
    const auto free = [&](Split& split) {
      if (split.wait != Wait::kEvent || split.token != token) return;
      split.wait = Wait::kNone;
      split.waits_for = nullptr;
      woken = true;
    };
    free(warp.current);
    for (Split& split : warp.others) free(split);
    if (woken) cta.wake(warp);
  }
}

bool is_complete(const Cta& cta, const NamedBarrier& barrier) {
  if (barrier.expected == 0) return false;
  if (!barrier.everyone) return barrier.arrived >= barrier.expected;
  for (const Warp& warp : cta.warps) {
    if (!barrier.has_arrived[warp.index] && !warp.done()) return false;
  }
  return true;
}

void complete(Cta& cta, NamedBarrier& barrier) {
  const uint64_t token = token_of(cta, barrier);
  synchronise(cta, barrier);
  barrier.last_votes = barrier.votes;
  barrier.last_voters = barrier.voters;
  barrier.last_votes_valid = barrier.votes_valid;
  ++barrier.generation;
  barrier.expected = barrier.arrived = barrier.votes = barrier.voters = 0;
  barrier.everyone = false;
  barrier.votes_valid = true;
  barrier.has_arrived.assign(cta.warps.size(), 0);
  ++cta.barriers_passed;
  cta.progressed();
  wake_waiters(cta, token);
}

// All lanes of the warp are there: it arrives, with 32 threads whatever its lanes.
void arrive_warp(Warp& warp, NamedBarrier& barrier, Action action) {
  Cta& cta = *warp.cta;
  barrier.lanes[warp.index] = 0;
  barrier.has_arrived[warp.index] = 1;
  barrier.arrived += kLanes;
  if (action == Action::kArrive) {
    SyncVar variable{barrier.clock};
    cta.launch->checker->release(warp, variable);
    barrier.clock = variable.clock;
    // Lanes that arrived at another instruction waited for these only.
    const uint64_t token = token_of(cta, barrier);
    for (Split& split : warp.others) {
      if (split.wait != Wait::kEvent || split.token != token) continue;
      if (action_of(warp.program->code[split.pc]) != Action::kArrive) continue;
      split.wait = Wait::kNone;
      split.waits_for = nullptr;
    }
  }
  if (is_complete(cta, barrier)) complete(cta, barrier);
}

// The number of threads this barrier expects, as this instruction has it; wrong ones are findings.
void expect(Warp& warp, const Instr& instr, LaneMask mask, NamedBarrier& barrier, int id) {
  Cta& cta = *warp.cta;
  const uint32_t all = uint32_t(cta.warps.size()) * kLanes;
  uint32_t count = all;
  const bool counted = instr.variant & kHasCount;
  if (counted) {
    count = uniform_operand(warp, instr, 1, mask);
    if (count == 0 || count % kLanes != 0 || count > all) {
      finding(warp, instr, mask, FindingKind::kBarrierCount,
              "barrier " + std::to_string(id) + " with a count of " + std::to_string(count) +
                  " threads: not a multiple of 32 from 32 to the " +
                  std::to_string(cta.num_threads) + " threads of the block");
      count = count == 0 ? all : (count + kLanes - 1) / kLanes * kLanes;
    }
  } else {
    barrier.everyone = true;
  }
  if (barrier.expected != 0 && barrier.expected != count) {
    finding(warp, instr, mask, FindingKind::kBarrierCount,
            "barrier " + std::to_string(id) + " with a count of " + std::to_string(count) +
                " threads, where others that have arrived expect " +
                std::to_string(barrier.expected));
  }
  if (barrier.expected == 0) barrier.expected = count;
  if (barrier.lanes.empty()) {
    barrier.lanes.assign(cta.warps.size(), 0);
    barrier.has_arrived.assign(cta.warps.size(), 0);
  }
  if (barrier.has_arrived[warp.index]) {
    finding(warp, instr, mask, FindingKind::kBarrierCount,
            "the warp arrives at barrier " + std::to_string(id) +
                " a second time before it is complete");
  }
}

void vote(Warp& warp, const Instr& instr, LaneMask mask, NamedBarrier& barrier) {
  const Operand& operand = instr.source((instr.variant & kHasCount) ? 2 : 1);
  barrier.votes += uint32_t(std::popcount(predicate(warp, operand) & mask));
  barrier.voters += uint32_t(std::popcount(mask));
  if (warp.valid && operand.reg != kNoRegister && (mask & ~warp.valid[operand.reg]) != 0) {
    barrier.votes_valid = false;
  }
}

void store_result(Warp& warp, const Instr& instr, LaneMask mask, const NamedBarrier& barrier) {
  const Action action = action_of(instr);
  const Operand& dest = instr.dest(0);
  if (action == Action::kRedPopc) {
    uint32_t* out = dest_lanes<uint32_t>(warp, dest);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) out[lane] = barrier.last_votes;
    }
  } else {
    const bool value = action == Action::kRedAnd ? barrier.last_votes == barrier.last_voters
                                                 : barrier.last_votes != 0;
    set_predicate(warp, dest, mask, value ? kFullMask : 0);
  }
  if (warp.valid && dest.reg != kNoRegister) {
    LaneMask& valid = warp.valid[dest.reg];
    valid = barrier.last_votes_valid ? valid | mask : valid & ~mask;
  }
}

Step wait(Warp& warp, const char* why, Wait how) {
  warp.current.wait = how;
  warp.current.waits_for = why;
  return Step::kBlock;
}

Step run_barrier(Warp& warp, const Instr& instr, LaneMask mask) {
  Cta& cta = *warp.cta;
  const Action action = action_of(instr);
  const uint32_t id = uniform_operand(warp, instr, 0, mask);
  if (id >= 16) {
    throw LaunchFailure(715, describe(warp, instr, mask) + ": barrier " + std::to_string(id) +
                                 "; a block has barriers 0 to 15");
  }
  NamedBarrier& barrier = cta.barriers[id];
  if (warp.current.arrived) {
    const bool passed = warp.current.token != token_of(cta, barrier);
    const bool signalled = action == Action::kArrive && (passed || barrier.has_arrived[warp.index]);
    if (!passed && !signalled) return wait(warp, "threads that have not arrived", Wait::kEvent);
    if (is_reduction(action)) store_result(warp, instr, mask, barrier);
    return Step::kNext;
  }
  if ((instr.variant & kAligned) && mask != warp.alive()) {
    if (!warp.stuck) return wait(warp, "the other lanes of its warp", Wait::kConverge);
    finding(warp, instr, mask, FindingKind::kDivergentBarrier,
            "an aligned barrier executed by a part of the warp's threads: lanes " +
                describe_lanes(warp.alive() & ~mask) + " are elsewhere");
  }
  expect(warp, instr, mask, barrier, int(id));
  if (is_reduction(action)) vote(warp, instr, mask, barrier);
  if (warp.current.mask & ~mask) warp.detach_others(mask);
  warp.current.arrived = true;
  warp.current.token = token_of(cta, barrier);
  LaneMask& lanes = barrier.lanes[warp.index];
  lanes |= mask;
  if ((warp.alive() & ~lanes) == 0) arrive_warp(warp, barrier, action);
  return run_barrier(warp, instr, mask);
}

void decode_cta_barrier(Decoding& d, bool aligned) {
  d.take(".cta");
  const std::string_view form = d.take_one({".sync", ".arrive", ".red"});
  if (form.empty()) d.malformed("one of .sync, .arrive, .red");
  aligned |= d.take(".aligned");
  Action action = form == ".sync" ? Action::kSync : Action::kArrive;
  if (form == ".red") {
    const std::string_view op = d.take_one({".popc", ".and", ".or"});
    if (op.empty()) d.malformed("one of .popc, .and, .or");
    action = op == ".popc" ? Action::kRedPopc : op == ".and" ? Action::kRedAnd : Action::kRedOr;
    const Type type = action == Action::kRedPopc ? Type::kU32 : Type::kPred;
    if (d.need_type() != type) d.malformed(op == ".popc" ? "the type .u32" : "the type .pred");
    d.dest(type);
  }
  const int last = is_reduction(action) ? 1 : 0;
  d.source(Type::kU32);
  uint32_t variant = uint32_t(action) | (aligned ? kAligned : 0);
  if (d.operands_left() > last) {
    d.source(Type::kU32);
    variant |= kHasCount;
  } else if (action == Action::kArrive) {
    d.malformed("a thread count");
  }
  if (is_reduction(action)) d.source(Type::kPred);
  d.instr().variant = variant;
  d.handler(run_barrier, InstrClass::kBarrier, kOwnValidity);
}

void decode_bar(Decoding& d) {
  if (d.take(".warp")) {
    d.take(".sync");
    decode_warp_barrier(d);
    return;
  }
  decode_cta_barrier(d, /*aligned=*/true);
}

void decode_barrier(Decoding& d) {
  if (d.take(".cluster")) {
    decode_cluster_barrier(d);
    return;
  }
  decode_cta_barrier(d, /*aligned=*/false);
}

constexpr Opcode kOpcodes[] = {{"bar", decode_bar}, {"barrier", decode_barrier}};

}  // namespace

const OpcodeFamily kBarrierFamily{"barrier", kOpcodes, std::size(kOpcodes)};

void barriers_after_exit(Warp& warp, LaneMask lanes) {
  Cta& cta = *warp.cta;
  cluster_after_exit(warp, lanes);
  for (NamedBarrier& barrier : cta.barriers) {
    if (barrier.expected == 0) continue;
    const LaneMask there = barrier.lanes[warp.index];
    if (there != 0 && (warp.alive() & ~there) == 0) {
      const uint64_t token = token_of(cta, barrier);
      Action action = Action::kSync;
      for (const Split& split : warp.others) {
        if (split.token == token && split.arrived) action = action_of(warp.program->code[split.pc]);
      }
      arrive_warp(warp, barrier, action);
    } else if (barrier.everyone && is_complete(cta, barrier)) {
      complete(cta, barrier);
    }
  }
}

std::string describe_barrier(const Warp& warp, const Split& split) {
  const Cta& cta = *warp.cta;
  const uint64_t id = split.token >> kTokenBarrierShift;
  if (warp.program->code[split.pc].run != run_barrier || !split.arrived || id == 0 || id > 16)
    return "";
  const NamedBarrier& barrier = cta.barriers[id - 1];
  std::string text = "barrier " + std::to_string(id - 1) + ", where " +
                     std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
                     " threads have arrived";
  std::string missing;
  for (const Warp& other : cta.warps) {
    if (barrier.has_arrived[other.index]) continue;
    missing += (missing.empty() ? " (not: warp " : ", ") + std::to_string(other.index);
    if (other.done()) missing += " exited";
  }
  return text + (missing.empty() ? "" : missing + ")");
}

}  // namespace fused_peft::sim
