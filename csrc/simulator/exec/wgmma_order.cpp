// When wgmma operations take place: at once, or as late as the wait for them; wgmma.fence,
// commit_group, wait_group.
#include <bit>

#include "simulator/check/checker.h"
#include "simulator/core/random.h"
#include "simulator/core/validity.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/mma.h"
#include "simulator/exec/wgmma.h"

namespace fused_peft::sim {
namespace {

// Whether this operation waits. The same for all warps of the warpgroup.
bool is_late(const Warp& warp, const WgmmaOperation& operation) {
  const Options& options = warp.cta->launch->options;
  if (options.async_timing == AsyncTiming::kEarly) return false;
  if (options.async_timing == AsyncTiming::kLate) return true;
  const uint64_t place = (warp.cta->linear << 8 | warp.index / 4) << 32 | operation.sequence;
  return Random(options.seed * 0x9e3779b97f4a7c15u ^ place).below(2) != 0;
}

// The value that all lanes must have.
template <class T>
T uniform_value(Warp& warp, const Instr& instr, const Operand& operand, LaneMask mask,
                const char* what) {
  const T* lanes = lanes_of<T>(warp, operand);
  const T value = lanes[std::countr_zero(mask)];
  LaneMask different = 0;
  for (int lane = 0; lane < kLanes; ++lane) different |= LaneMask(lanes[lane] != value) << lane;
  if (different & mask) [[unlikely]] {
    warp.cta->launch->checker->report(warp, instr, different & mask, FindingKind::kOther,
                                      std::string(what) + " differs between the lanes of the warp");
  }
  return value;
}

void hide(Warp& warp, WgmmaState& state, const Instr& instr) {
  for (int i = 0; warp.valid != nullptr && i < instr.num_dests; ++i) {
    state.hidden.emplace_back(&instr.dest(i), valid_lanes(warp, instr.dest(i)));
    set_valid(warp, instr.dest(i), kFullMask, 0);
  }
}

void unhide(Warp& warp, WgmmaState& state) {
  for (; !state.hidden.empty(); state.hidden.pop_back()) {
    set_valid(warp, *state.hidden.back().first, kFullMask, state.hidden.back().second);
  }
}

// Executes the groups but the last `keep`.
void retire(Warp& warp, WgmmaState& state, size_t keep) {
  if (state.groups.size() <= keep) return;
  unhide(warp, state);
  while (state.groups.size() > keep) {
    for (const WgmmaOperation& operation : state.groups.front()) {
      wgmma_form(*operation.instr).execute(warp, operation);
    }
    state.groups.pop_front();
  }
  for (const auto& group : state.groups) {
    for (const WgmmaOperation& operation : group) hide(warp, state, *operation.instr);
  }
  for (const WgmmaOperation& operation : state.open) hide(warp, state, *operation.instr);
}

using Count = uint64_t WgmmaState::*;

// All warps of the warpgroup that are there have come to this instruction `times` times.
bool all_have_come(Warp& warp, Count count, uint64_t times, std::vector<Warp*>& members) {
  Cta& cta = *warp.cta;
  const uint32_t first = warp.index & ~3u;
  for (uint32_t i = first; i < first + 4 && i < cta.warps.size(); ++i) {
    if (cta.warps[i].done()) continue;
    if (wgmma_of(cta.warps[i]).*count < times) return false;
    members.push_back(&cta.warps[i]);
  }
  return true;
}

// The warp goes on when the other three have come; `last` is called by the last of them.
template <class Last>
Step meet(Warp& warp, Count count, const char* waits_for, Last last) {
  std::vector<Warp*> members;
  if (warp.current.arrived) {
    if (all_have_come(warp, count, warp.current.token, members)) return Step::kNext;
  } else {
    warp.current.arrived = true;
    warp.current.token = ++(wgmma_of(warp).*count);
    if (all_have_come(warp, count, warp.current.token, members)) {
      last(members);
      warp.cta->progressed();
      return Step::kNext;
    }
  }
  warp.current.waits_for = waits_for;
  return Step::kBlock;
}

// The warps wait for one another, as they do on the device (CUTLASS's wgmma_sm90.cu depends on it),
// but the ISA does not promise that it orders their accesses: for the race check it is no barrier.
Step fence(Warp& warp, const Instr& instr, LaneMask mask) {
  if (!warp.current.arrived && waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  return meet(warp, &WgmmaState::fences, "the other warps of its warpgroup at wgmma.fence",
              [](const std::vector<Warp*>&) {});
}

Step commit_group(Warp& warp, const Instr& instr, LaneMask mask) {
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  WgmmaState& state = wgmma_of(warp);
  state.groups.push_back(std::move(state.open));
  state.open.clear();
  return Step::kNext;
}

// The operation is the warpgroup's, so its end is too: after the wait one thread may speak for all
// four warps.
Step wait_group(Warp& warp, const Instr& instr, LaneMask mask) {
  if (!warp.current.arrived) {
    if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
    retire(warp, wgmma_of(warp), size_t(instr.imm));
  }
  return meet(
      warp, &WgmmaState::waits, "the other warps of its warpgroup at wgmma.wait_group",
      [&](const std::vector<Warp*>& members) { warp.cta->launch->checker->rendezvous(members); });
}

}  // namespace

WgmmaState& wgmma_of(Warp& warp) {
  if (!warp.wgmma) warp.wgmma = std::make_shared<WgmmaState>();
  return *static_cast<WgmmaState*>(warp.wgmma.get());
}

Step issue_wgmma(Warp& warp, const Instr& instr, LaneMask mask) {
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  if ((warp.index | 3) >= warp.cta->warps.size()) {
    warp.cta->launch->checker->report(warp, instr, mask, FindingKind::kOther,
                                      "its warpgroup has less than four warps");
  }
  const WgmmaForm& form = wgmma_form(instr);
  WgmmaState& state = wgmma_of(warp);
  const int descriptor = form.registers_a ? 4 : 0;  // of the first descriptor among the sources
  WgmmaOperation operation{.instr = &instr, .sequence = state.issued++};
  operation.valid = kFullMask;
  for (int i = descriptor; i < instr.num_sources; ++i)
    operation.valid &= valid_lanes(warp, instr.source(i));
  if (!form.registers_a) {
    operation.a =
        uniform_value<uint64_t>(warp, instr, instr.source(0), mask, "the descriptor of A");
  }
  const int b = form.registers_a ? 4 : 1;
  operation.b = uniform_value<uint64_t>(warp, instr, instr.source(b), mask, "the descriptor of B");
  const LaneMask scale = predicate(warp, instr.source(b + 1)) & mask;
  if (scale != 0 && scale != mask) {
    warp.cta->launch->checker->report(warp, instr, scale, FindingKind::kOther,
                                      "scale-d differs between the lanes of the warp");
  }
  operation.accumulates = scale != 0;
  bool pending = !state.open.empty();
  for (const auto& group : state.groups) pending |= !group.empty();
  if (!pending && !is_late(warp, operation)) {
    form.execute(warp, operation);
    return Step::kNext;
  }
  hide(warp, state, instr);
  state.open.push_back(operation);
  return Step::kNext;
}

bool decode_wgmma_order(Decoding& d) {
  Handler handler = nullptr;
  if (d.take(".fence")) handler = fence;
  if (d.take(".commit_group")) handler = commit_group;
  const bool wait = d.take(".wait_group");
  if (wait) handler = wait_group;
  if (handler == nullptr) return false;
  d.take(".sync");
  d.take(".aligned");
  if (wait) {
    const int64_t keep = d.immediate();
    if (keep < 0 || keep > 7) refuse_malformed(d, "wgmma.wait_group takes 0 to 7");
    d.instr().imm = keep;
  }
  d.handler(handler, wait ? InstrClass::kBarrier : InstrClass::kFence);
  return true;
}

}  // namespace fused_peft::sim
