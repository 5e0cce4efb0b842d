#include "simulator/exec/cluster_barrier.h"

#include <bit>

#include "simulator/check/checker.h"

namespace fused_peft::sim {
namespace {

// Instr::variant
constexpr uint32_t kAligned = 1;
constexpr uint32_t kRelaxed = 2;

// Split::token of lanes at barrier.cluster.wait; no named barrier has it.
constexpr uint64_t kClusterToken = ~uint64_t{0};

void finding(Warp& warp, const Instr& instr, LaneMask lanes, FindingKind kind,
             const std::string& detail) {
  Launch& launch = *warp.cta->launch;
  if (launch.options.synccheck) launch.checker->report(warp, instr, lanes, kind, detail);
}

// Aligned forms need the whole warp; they wait for it at first, and report where it never comes
// together.
bool must_converge(Warp& warp, const Instr& instr, LaneMask mask) {
  if (!(instr.variant & kAligned) || mask == warp.alive()) return false;
  if (warp.stuck) {
    finding(warp, instr, mask, FindingKind::kDivergentBarrier,
            "an aligned cluster barrier executed by a part of the warp's threads: lanes " +
                describe_lanes(warp.alive() & ~mask) + " are elsewhere");
    return false;
  }
  warp.current.wait = Wait::kConverge;
  warp.current.waits_for = "the other lanes of its warp";
  return true;
}

void complete_if_all(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live_threads) return;
  cluster.arrived = 0;
  ++cluster.generation;
  for (Cta* cta : cluster.ctas) {
    cta->progressed();
    for (Warp& warp : cta->warps) {
      const auto is_waiting = [](const Split& split) {
        return split.wait == Wait::kEvent && (split.token == kClusterToken);
      };
      bool woken = false;
      const auto free = [&](Split& split) {
        if (!is_waiting(split)) return;
        split.wait = Wait::kNone;
        split.waits_for = nullptr;
        woken = true;
      };
      free(warp.current);
      for (Split& split : warp.others) free(split);
      if (woken) cta->wake(warp);
    }
  }
}

Step run_arrive(Warp& warp, const Instr& instr, LaneMask mask) {
  if (must_converge(warp, instr, mask)) return Step::kBlock;
  Cluster& cluster = *warp.cta->cluster;
  const LaneMask again = mask & warp.cluster_arrived;
  if (again) {
    finding(warp, instr, again, FindingKind::kBarrierCount,
            "barrier.cluster.arrive a second time without barrier.cluster.wait in between");
  }
  const LaneMask fresh = mask & ~warp.cluster_arrived;
  if (fresh == 0) return Step::kNext;
  const uint64_t parity = cluster.generation & 1;
  warp.cluster_arrived |= fresh;
  warp.cluster_odd = parity ? warp.cluster_odd | fresh : warp.cluster_odd & ~fresh;
  Checker& checker = *warp.cta->launch->checker;
  if (cluster.arrived == 0) {
    SyncVar old{cluster.clocks[parity]};
    if (old.clock) checker.drop(old);
    cluster.clocks[parity] = nullptr;
  }
  SyncVar variable{cluster.clocks[parity]};
  if (instr.variant & kRelaxed) {
    checker.release_fenced(warp, variable);  // what a fence before it covers, and no more
  } else {
    checker.release(warp, variable);
  }
  cluster.clocks[parity] = variable.clock;
  cluster.arrived += uint32_t(std::popcount(fresh));
  complete_if_all(cluster);
  return Step::kNext;
}

Step run_wait(Warp& warp, const Instr& instr, LaneMask mask) {
  if (must_converge(warp, instr, mask)) return Step::kBlock;
  Cluster& cluster = *warp.cta->cluster;
  const LaneMask never = mask & ~warp.cluster_arrived;
  if (never) {
    finding(warp, instr, never, FindingKind::kBarrierCount,
            "barrier.cluster.wait without barrier.cluster.arrive before it");
  }
  const bool odd_now = cluster.generation & 1;
  const LaneMask waiting =
      mask & warp.cluster_arrived & (odd_now ? warp.cluster_odd : ~warp.cluster_odd);
  if (waiting) {
    warp.current.wait = Wait::kEvent;
    warp.current.token = kClusterToken;
    warp.current.arrived = true;
    warp.current.waits_for = "barrier.cluster";
    return Step::kBlock;
  }
  warp.cluster_arrived &= ~mask;
  const SyncVar variable{cluster.clocks[odd_now ? 0 : 1]};
  Checker& checker = *warp.cta->launch->checker;
  if (variable.clock) checker.acquire(warp, variable);
  checker.synchronised_lanes(warp, mask);
  return Step::kNext;
}

}  // namespace

void decode_cluster_barrier(Decoding& d) {
  const std::string_view form = d.take_one({".arrive", ".wait"});
  uint32_t variant = 0;
  if (form == ".arrive") {
    if (d.take_one({".release", ".relaxed"}) == ".relaxed") variant |= kRelaxed;
  } else if (form == ".wait") {
    d.take(".acquire");
  } else {
    d.malformed("one of .arrive, .wait");
  }
  if (d.take(".aligned")) variant |= kAligned;
  d.instr().variant = variant;
  d.handler(form == ".arrive" ? run_arrive : run_wait, InstrClass::kBarrier);
}

void cluster_after_exit(Warp& warp, LaneMask lanes) {
  Cluster& cluster = *warp.cta->cluster;
  cluster.live_threads -= uint32_t(std::popcount(lanes));
  // A thread that arrived and then exits is no longer counted among the living.
  const LaneMask pending = lanes & warp.cluster_arrived &
                           ((cluster.generation & 1) ? warp.cluster_odd : ~warp.cluster_odd);
  cluster.arrived -= uint32_t(std::popcount(pending));
  complete_if_all(cluster);
}

std::string describe_cluster_barrier(const Warp& warp, const Split& split) {
  if (split.wait != Wait::kEvent || split.token != kClusterToken) return "";
  const Cluster& cluster = *warp.cta->cluster;
  return "barrier.cluster, where " + std::to_string(cluster.arrived) + " of " +
         std::to_string(cluster.live_threads) + " threads have arrived";
}

}  // namespace fused_peft::sim
