// Instructions that pass values between the lanes of a warp: shfl, vote, match, redux, elect,
// activemask, bar.warp.
#include <algorithm>
#include <bit>
#include <string>

#include "simulator/core/validity.h"
#include "simulator/exec/families.h"
#include "simulator/exec/warp_collective.h"

namespace fused_peft::sim {
namespace {

// A result that every lane of the group gets, computed from the values of all of them.
template <class T>
void broadcast(Warp& warp, const Operand& dest, LaneMask lanes, T value) {
  T* out = dest_lanes<T>(warp, dest);
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = (lanes >> lane & 1) ? value : out[lane];
}

LaneMask all_or_none(LaneMask lanes, LaneMask valid) { return (lanes & ~valid) ? 0 : kFullMask; }

// ---- shfl.sync (PTX ISA 9.7.9.6)

enum class Shuffle : uint32_t { kUp, kDown, kButterfly, kIndex };

template <Shuffle kMode>
int source_lane(int lane, uint32_t b, uint32_t c, bool* in_range) {
  const int offset = int(b & 31), clamp = int(c & 31), segment = int(c >> 8 & 31);
  const int first = lane & segment;
  const int last = first | (clamp & ~segment);
  int from = 0;
  if constexpr (kMode == Shuffle::kUp) from = lane - offset;
  if constexpr (kMode == Shuffle::kDown) from = lane + offset;
  if constexpr (kMode == Shuffle::kButterfly) from = lane ^ offset;
  if constexpr (kMode == Shuffle::kIndex) from = first | (offset & ~segment);
  *in_range = kMode == Shuffle::kUp ? from >= last : from <= last;
  return *in_range ? from : lane;
}

template <Shuffle kMode>
Step run_shuffle(Warp& warp, const Instr& instr, LaneMask mask) {
  const bool has_predicate = instr.num_dests == 2;
  return collective(warp, instr, mask, instr.source(3), [&](LaneMask group) {
    const auto* a = lanes_of<uint32_t>(warp, instr.source(0));
    const auto* b = lanes_of<uint32_t>(warp, instr.source(1));
    const auto* c = lanes_of<uint32_t>(warp, instr.source(2));
    const LaneMask value_valid = valid_lanes(warp, instr.source(0));
    const LaneMask control_valid =
        valid_lanes(warp, instr.source(1)) & valid_lanes(warp, instr.source(2));
    uint32_t out[kLanes];
    LaneMask in_range = 0, valid = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      bool inside;
      const int from = source_lane<kMode>(lane, b[lane], c[lane], &inside);
      out[lane] = a[from];
      in_range |= LaneMask(inside) << lane;
      // The value of a lane that takes no part is undefined.
      valid |= ((value_valid & group) >> from & 1) << lane;
    }
    uint32_t* dest = dest_lanes<uint32_t>(warp, instr.dest(0));
    for (int lane = 0; lane < kLanes; ++lane)
      dest[lane] = (group >> lane & 1) ? out[lane] : dest[lane];
    set_valid(warp, instr.dest(0), group, valid & control_valid);
    if (has_predicate) {
      set_predicate(warp, instr.dest(1), group, in_range);
      set_valid(warp, instr.dest(1), group, control_valid);
    }
  });
}

void decode_shfl(Decoding& d) {
  if (!d.take(".sync")) d.unsupported("shfl without .sync (there is none from sm_70 on)");
  const std::string_view mode = d.take_one({".up", ".down", ".bfly", ".idx"});
  if (mode.empty()) d.malformed("one of .up, .down, .bfly, .idx");
  if (d.need_type() != Type::kB32) d.malformed("the type .b32");
  const bool second = d.has_second_predicate();
  d.dest(Type::kB32);
  if (second) d.dest(Type::kPred);
  for (int i = 0; i < 4; ++i) d.source(Type::kB32);
  const Handler run = mode == ".up"     ? run_shuffle<Shuffle::kUp>
                      : mode == ".down" ? run_shuffle<Shuffle::kDown>
                      : mode == ".bfly" ? run_shuffle<Shuffle::kButterfly>
                                        : run_shuffle<Shuffle::kIndex>;
  d.handler(run, InstrClass::kWarp, kOwnValidity);
}

// ---- vote.sync

enum class Vote : uint32_t { kAll, kAny, kUniform, kBallot };

template <Vote kMode>
Step run_vote(Warp& warp, const Instr& instr, LaneMask mask) {
  return collective(warp, instr, mask, instr.source(1), [&](LaneMask group) {
    const LaneMask votes = predicate(warp, instr.source(0)) & group;
    const LaneMask valid = all_or_none(group, valid_lanes(warp, instr.source(0)));
    if constexpr (kMode == Vote::kBallot) {
      broadcast<uint32_t>(warp, instr.dest(0), group, votes);
    } else {
      const bool result = kMode == Vote::kAll   ? votes == group
                          : kMode == Vote::kAny ? votes != 0
                                                : votes == group || votes == 0;
      set_predicate(warp, instr.dest(0), group, result ? kFullMask : 0);
    }
    set_valid(warp, instr.dest(0), group, valid);
  });
}

void decode_vote(Decoding& d) {
  if (!d.take(".sync")) d.unsupported("vote without .sync (there is none from sm_70 on)");
  const std::string_view mode = d.take_one({".all", ".any", ".uni", ".ballot"});
  if (mode.empty()) d.malformed("one of .all, .any, .uni, .ballot");
  const Type type = mode == ".ballot" ? Type::kB32 : Type::kPred;
  if (d.need_type() != type) d.malformed(mode == ".ballot" ? "the type .b32" : "the type .pred");
  d.dest(type);
  d.source(Type::kPred);
  d.source(Type::kB32);
  const Handler run = mode == ".all"   ? run_vote<Vote::kAll>
                      : mode == ".any" ? run_vote<Vote::kAny>
                      : mode == ".uni" ? run_vote<Vote::kUniform>
                                       : run_vote<Vote::kBallot>;
  d.handler(run, InstrClass::kWarp, kOwnValidity);
}

// ---- match.sync

template <class T>
LaneMask lanes_with(const T* values, LaneMask group, T value) {
  LaneMask equal = 0;
  for (int lane = 0; lane < kLanes; ++lane) equal |= LaneMask(values[lane] == value) << lane;
  return equal & group;
}

template <class T>
Step run_match_any(Warp& warp, const Instr& instr, LaneMask mask) {
  return collective(warp, instr, mask, instr.source(1), [&](LaneMask group) {
    const T* values = lanes_of<T>(warp, instr.source(0));
    const LaneMask valid = all_or_none(group, valid_lanes(warp, instr.source(0)));
    uint32_t out[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = lanes_with(values, group, values[lane]);
    uint32_t* dest = dest_lanes<uint32_t>(warp, instr.dest(0));
    for (int lane = 0; lane < kLanes; ++lane)
      dest[lane] = (group >> lane & 1) ? out[lane] : dest[lane];
    set_valid(warp, instr.dest(0), group, valid);
  });
}

template <class T>
Step run_match_all(Warp& warp, const Instr& instr, LaneMask mask) {
  return collective(warp, instr, mask, instr.source(1), [&](LaneMask group) {
    const T* values = lanes_of<T>(warp, instr.source(0));
    const LaneMask valid = all_or_none(group, valid_lanes(warp, instr.source(0)));
    const bool same = lanes_with(values, group, values[std::countr_zero(group)]) == group;
    broadcast<uint32_t>(warp, instr.dest(0), group, same ? group : 0);
    set_valid(warp, instr.dest(0), group, valid);
    if (instr.num_dests == 2) {
      set_predicate(warp, instr.dest(1), group, same ? kFullMask : 0);
      set_valid(warp, instr.dest(1), group, valid);
    }
  });
}

void decode_match(Decoding& d) {
  const std::string_view mode = d.take_one({".any", ".all"});
  if (mode.empty()) d.malformed("one of .any, .all");
  if (!d.take(".sync")) d.malformed(".sync");
  const Type type = d.need_type();
  if (type != Type::kB32 && type != Type::kB64) d.malformed("the type .b32 or .b64");
  const bool second = d.has_second_predicate();
  d.dest(Type::kB32);
  if (second) d.dest(Type::kPred);
  d.source(type);
  d.source(Type::kB32);
  const bool wide = type == Type::kB64;
  const Handler run = mode == ".any" ? (wide ? run_match_any<uint64_t> : run_match_any<uint32_t>)
                                     : (wide ? run_match_all<uint64_t> : run_match_all<uint32_t>);
  d.handler(run, InstrClass::kWarp, kOwnValidity);
}

// ---- redux.sync

struct ReduceAdd {
  template <class T>
  T operator()(T a, T b) const {
    return T(uint32_t(a) + uint32_t(b));
  }
};
struct ReduceMin {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct ReduceMax {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct ReduceAnd {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct ReduceOr {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct ReduceXor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};

template <class T, class Op>
Step run_redux(Warp& warp, const Instr& instr, LaneMask mask) {
  return collective(warp, instr, mask, instr.source(1), [&](LaneMask group) {
    const T* values = lanes_of<T>(warp, instr.source(0));
    const LaneMask valid = all_or_none(group, valid_lanes(warp, instr.source(0)));
    LaneMask left = group & (group - 1);
    T sum = values[std::countr_zero(group)];
    for (; left != 0; left &= left - 1) sum = Op()(sum, values[std::countr_zero(left)]);
    broadcast<T>(warp, instr.dest(0), group, sum);
    set_valid(warp, instr.dest(0), group, valid);
  });
}

void decode_redux(Decoding& d) {
  if (!d.take(".sync")) d.malformed(".sync");
  const std::string_view op = d.take_one({".add", ".min", ".max", ".and", ".or", ".xor"});
  const Type type = d.need_type();
  const bool bitwise = op == ".and" || op == ".or" || op == ".xor";
  if (op.empty()) d.malformed("one of .add, .min, .max, .and, .or, .xor");
  if (bitwise ? type != Type::kB32 : type != Type::kU32 && type != Type::kS32) {
    d.unsupported(std::string("redux.sync") + std::string(op) + " of this type");
  }
  d.dest(type);
  d.source(type);
  d.source(Type::kB32);
  const bool is_signed_type = type == Type::kS32;
  Handler run = nullptr;
  if (op == ".add") run = run_redux<uint32_t, ReduceAdd>;
  if (op == ".min")
    run = is_signed_type ? run_redux<int32_t, ReduceMin> : run_redux<uint32_t, ReduceMin>;
  if (op == ".max")
    run = is_signed_type ? run_redux<int32_t, ReduceMax> : run_redux<uint32_t, ReduceMax>;
  if (op == ".and") run = run_redux<uint32_t, ReduceAnd>;
  if (op == ".or") run = run_redux<uint32_t, ReduceOr>;
  if (op == ".xor") run = run_redux<uint32_t, ReduceXor>;
  d.handler(run, InstrClass::kWarp, kOwnValidity);
}

// ---- activemask, elect.sync, bar.warp.sync

Step run_activemask(Warp& warp, const Instr& instr, LaneMask mask) {
  broadcast<uint32_t>(warp, instr.dest(0), mask, mask);
  return Step::kNext;
}

void decode_activemask(Decoding& d) {
  if (d.need_type() != Type::kB32) d.malformed("the type .b32");
  d.dest(Type::kB32);
  d.handler(run_activemask, InstrClass::kWarp);
}

// The leader is the lowest lane of those that take part.
Step run_elect(Warp& warp, const Instr& instr, LaneMask mask) {
  return collective(warp, instr, mask, instr.source(0), [&](LaneMask group) {
    const int leader = std::countr_zero(group);
    broadcast<uint32_t>(warp, instr.dest(0), group, uint32_t(leader));
    set_valid(warp, instr.dest(0), group, kFullMask);
    set_predicate(warp, instr.dest(1), group, LaneMask{1} << leader);
    set_valid(warp, instr.dest(1), group, kFullMask);
  });
}

void decode_elect(Decoding& d) {
  if (!d.take(".sync")) d.malformed(".sync");
  if (!d.has_second_predicate()) d.malformed("a destination predicate");
  d.dest(Type::kB32);
  d.dest(Type::kPred);
  d.source(Type::kB32);
  d.handler(run_elect, InstrClass::kWarp, kOwnValidity);
}

// Lanes may be at different bar.warp.sync instructions; those with one membermask release each
// other.
Step run_warp_barrier(Warp& warp, const Instr& instr, LaneMask mask) {
  const Operand& members = instr.source(0);
  const Step step = collective(warp, instr, mask, members, [](LaneMask) {});
  if (step != Step::kBlock || warp.others.empty()) return step;
  const LaneMask waiting = warp.current.mask;
  const uint32_t named = lanes_of<uint32_t>(warp, members)[std::countr_zero(waiting)];
  const auto waits_with = [&](const Split& split) {
    const Instr& at = warp.program->code[split.pc];
    return split.wait == Wait::kConverge && at.run == run_warp_barrier &&
           lanes_of<uint32_t>(warp, at.source(0))[std::countr_zero(split.mask)] == named;
  };
  LaneMask there = waiting;
  for (const Split& split : warp.others) there |= waits_with(split) ? split.mask : 0;
  if (named & warp.alive() & ~there) return step;
  for (Split& split : warp.others) {
    if (waits_with(split)) split = {.pc = split.pc + 1, .mask = split.mask};
  }
  warp.current.wait = Wait::kNone;
  warp.current.waits_for = nullptr;
  warp.cta->launch->checker->synchronised_lanes(warp, there);
  return Step::kNext;
}

constexpr Opcode kOpcodes[] = {
    {"shfl", decode_shfl},   {"vote", decode_vote},   {"match", decode_match},
    {"redux", decode_redux}, {"elect", decode_elect}, {"activemask", decode_activemask},
};

}  // namespace

void decode_warp_barrier(Decoding& d) {
  d.source(Type::kB32);
  d.handler(run_warp_barrier, InstrClass::kWarp);
}

void report_not_member(Warp& warp, const Instr& instr, LaneMask lanes) {
  Launch& launch = *warp.cta->launch;
  if (!launch.options.synccheck) return;
  launch.checker->report(warp, instr, lanes, FindingKind::kOther,
                         "lanes " + describe_lanes(lanes) + " are not in the membermask they name");
}

const OpcodeFamily kWarpFamily{"warp", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
