// Control flow and what concerns a thread as such: bra, brx, exit, trap, nanosleep, setmaxnreg,
// griddepcontrol.
#include <bit>
#include <limits>
#include <vector>

#include "simulator/check/checker.h"
#include "simulator/core/cta.h"
#include "simulator/exec/barrier.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

constexpr int kErrorLaunchFailure = 719;
constexpr int kErrorIllegalInstruction = 715;

Step run_branch(Warp& warp, const Instr& instr, LaneMask mask) {
  warp.branch(mask, instr.target);
  return Step::kJump;
}

void decode_bra(Decoding& d) {
  d.take(".uni");
  d.name();
  d.handler(run_branch, InstrClass::kBranch);
}

Step run_indexed_branch(Warp& warp, const Instr& instr, LaneMask mask) {
  const auto& targets = *static_cast<const std::vector<uint32_t>*>(instr.extra);
  const uint32_t* index = lanes_of<uint32_t>(warp, instr.source(0));
  const Split whole = warp.current;
  LaneMask left = mask;
  std::vector<Split> pieces;
  if (whole.mask & ~mask) pieces.push_back({.pc = whole.pc + 1, .mask = whole.mask & ~mask});
  while (left != 0) {
    const uint32_t at = index[std::countr_zero(left)];
    LaneMask lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) lanes |= LaneMask(index[lane] == at) << lane;
    lanes &= left;
    left &= ~lanes;
    if (at >= targets.size()) {
      throw LaunchFailure(kErrorLaunchFailure, describe(warp, instr, lanes) + ": index " +
                                                   std::to_string(at) + " into a table of " +
                                                   std::to_string(targets.size()) + " targets");
    }
    pieces.push_back({.pc = targets[at], .mask = lanes});
  }
  size_t first = 0;
  for (size_t i = 1; i < pieces.size(); ++i) {
    if (pieces[i].pc < pieces[first].pc) first = i;
  }
  warp.current = pieces[first];
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (i != first) warp.others.push_back(pieces[i]);
  }
  if (pieces.size() > 1) warp.diverged_for = 0;
  return Step::kJump;
}

void decode_brx(Decoding& d) {
  if (!d.take(".idx")) d.malformed("brx.idx");
  d.take(".uni");
  d.source(Type::kU32);
  d.name();
  d.handler(run_indexed_branch, InstrClass::kBranch);
}

Step run_exit(Warp& warp, const Instr&, LaneMask mask) {
  warp.exit_lanes(mask, warp.current.pc + 1);
  barriers_after_exit(warp, mask);
  warp.cta->progressed();
  return Step::kJump;
}

void decode_exit(Decoding& d) {
  d.take(".uni");
  d.handler(run_exit, InstrClass::kBranch);
}

Step run_trap(Warp& warp, const Instr& instr, LaneMask mask) {
  throw LaunchFailure(kErrorLaunchFailure, describe(warp, instr, mask) + ": trap");
}

Step run_breakpoint(Warp& warp, const Instr& instr, LaneMask mask) {
  throw LaunchFailure(kErrorIllegalInstruction,
                      describe(warp, instr, mask) + ": a breakpoint, and no debugger");
}

void decode_trap(Decoding& d) { d.handler(run_trap, InstrClass::kOther); }
void decode_breakpoint(Decoding& d) { d.handler(run_breakpoint, InstrClass::kOther); }

// Others run meanwhile, and the clocks show that it has slept.
Step run_nanosleep(Warp& warp, const Instr& instr, LaneMask mask) {
  *warp.cta->clock += lanes_of<uint32_t>(warp, instr.source(0))[std::countr_zero(mask)];
  return Step::kYield;
}

Step run_nothing(Warp&, const Instr&, LaneMask) { return Step::kNext; }

void decode_nanosleep(Decoding& d) {
  d.take(".u32");
  d.source(Type::kU32);
  d.handler(run_nanosleep, InstrClass::kOther);
}

// Launches of a stream run one after another, each to its end: whatever a dependent launch waits
// for has happened before it starts.
void decode_griddepcontrol(Decoding& d) {
  if (d.take_one({".launch_dependents", ".wait"}).empty()) {
    d.malformed("one of .launch_dependents, .wait");
  }
  d.handler(run_nothing, InstrClass::kOther);
}

void decode_pmevent(Decoding& d) {
  d.take(".mask");
  d.immediate();
  d.handler(run_nothing, InstrClass::kOther);
}

// setmaxnreg.{inc,dec}.sync.aligned.u32: the CTA's registers are a pool, as after the launch; dec
// gives back to it, inc waits until there are enough.
constexpr uint32_t kIncrease = 1;

Step run_setmaxnreg(Warp& warp, const Instr& instr, LaneMask mask) {
  Cta& cta = *warp.cta;
  const auto report = [&](const std::string& text) {
    cta.launch->checker->report(warp, instr, mask, FindingKind::kOther, text);
  };
  if (mask != warp.alive()) {
    if (!warp.stuck) {
      warp.current.wait = Wait::kConverge;
      warp.current.waits_for = "the other lanes of its warp";
      return Step::kBlock;
    }
    report("setmaxnreg executed by a part of the warp");
  }
  const int64_t wanted = instr.imm, held = warp.registers;
  const bool increase = instr.variant == kIncrease;
  if (increase ? wanted < held : wanted > held) {
    report(std::string(increase ? "setmaxnreg.inc below" : "setmaxnreg.dec above") +
           " the warp's " + std::to_string(held) + " registers a thread");
    return Step::kNext;
  }
  const int64_t more = (wanted - held) * kLanes;
  if (more > cta.free_registers) {
    warp.current.waits_for = "registers that other warps of the block give back by setmaxnreg.dec";
    return Step::kBlock;
  }
  cta.free_registers -= more;
  warp.registers = uint32_t(wanted);
  cta.progressed();
  return Step::kNext;
}

void decode_setmaxnreg(Decoding& d) {
  const std::string_view form = d.take_one({".inc", ".dec"});
  if (form.empty()) d.malformed("one of .inc, .dec");
  d.take(".sync");
  d.take(".aligned");
  d.take(".u32");
  const int64_t count = d.immediate();
  if (count < 24 || count > 256 || count % 8 != 0) d.malformed("a multiple of 8 from 24 to 256");
  d.instr().imm = count;
  d.instr().variant = form == ".inc" ? kIncrease : 0;
  d.handler(run_setmaxnreg, InstrClass::kOther);
}

constexpr Opcode kOpcodes[] = {
    {"bra", decode_bra},
    {"brx", decode_brx},
    {"exit", decode_exit},
    {"trap", decode_trap},
    {"brkpt", decode_breakpoint},
    {"nanosleep", decode_nanosleep},
    {"griddepcontrol", decode_griddepcontrol},
    {"pmevent", decode_pmevent},
    {"setmaxnreg", decode_setmaxnreg},
};

}  // namespace

const OpcodeFamily kControlFamily{"control", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
