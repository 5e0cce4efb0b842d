// cvta, isspacep, mapa, getctarank: addresses between spaces and CTAs (PTX ISA 9.7.9).
#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {

namespace {

// What turns an address of the space into a generic one.
uint64_t window_of(const Warp& warp, Space space, uint64_t address) {
  switch (space) {
    case Space::kShared: return kSharedWindow;
    case Space::kLocal: return kLocalWindow;
    case Space::kParam:
      // Of an entry function's parameters. A callee's lie in the thread's own memory, with no
      // generic address.
      return address >= kCalleeParam
                 ? 0
                 : reinterpret_cast<uint64_t>(warp.cta->launch->config.params.data());
    default: return 0;
  }
}

template <class T, bool kToSpace>
Step convert_address(Warp& warp, const Instr& instr, LaneMask mask) {
  const T* from = lanes_of<T>(warp, instr.source(0));
  T* to = dest_lanes<T>(warp, instr.dest(0));
  const auto space = static_cast<Space>(instr.variant);
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    // The whole parameter buffer has one window, so the way back does not depend on the address.
    const uint64_t window = window_of(warp, space, kToSpace ? 0 : from[lane]);
    to[lane] = static_cast<T>(kToSpace ? from[lane] - window : from[lane] + window);
  }
  return Step::kNext;
}

// cvta.space.size d, a: to generic; cvta.to.space.size d, a: from it.
void decode_cvta(Decoding& d) {
  const bool to_space = d.take(".to");
  const Space space = take_space(d);
  if (space == Space::kGeneric) d.malformed("cvta needs a state space");
  const bool wide = d.take(".u64");
  if (!wide) d.take(".u32");
  if (!wide && space != Space::kGlobal && space != Space::kConst) {
    d.unsupported("cvta.u32: generic addresses have 64 bits");
  }
  const Type type = wide ? Type::kB64 : Type::kB32;
  d.dest(type);
  d.source(type);
  d.instr().variant = static_cast<uint32_t>(space);
  if (wide) {
    d.handler(to_space ? convert_address<uint64_t, true> : convert_address<uint64_t, false>,
              InstrClass::kMove);
  } else {
    d.handler(to_space ? convert_address<uint32_t, true> : convert_address<uint32_t, false>,
              InstrClass::kMove);
  }
}

enum SpaceTest : uint32_t {
  kIsGlobal,
  kIsLocal,
  kIsSharedCta,
  kIsSharedCluster,
  kIsConst,
  kIsParam
};

bool lies_in(const Warp& warp, uint32_t test, uint64_t address) {
  const AlignedBytes& params = warp.cta->launch->config.params;
  const auto first = reinterpret_cast<uint64_t>(params.data());
  const bool param = address >= first && address - first < params.size();
  uint64_t offset = address;
  const Space space = split_generic(offset);
  switch (test) {
    case kIsGlobal: return space == Space::kGlobal && !param;
    case kIsLocal: return space == Space::kLocal;
    case kIsSharedCluster: return space == Space::kShared;
    case kIsSharedCta: {
      const uint64_t rank = offset >> kSharedRankShift;
      return space == Space::kShared && (rank == 0 || rank - 1 == warp.cta->rank);
    }
    case kIsParam: return param;
    default:
      return false;  // constant variables are told from global ones by their instructions only
  }
}

Step is_space(Warp& warp, const Instr& instr, LaneMask mask) {
  const uint64_t* address = lanes_of<uint64_t>(warp, instr.source(0));
  LaneMask result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lies_in(warp, instr.variant, address[lane])) result |= LaneMask{1} << lane;
  }
  set_predicate(warp, instr.dest(0), mask, result);
  return Step::kNext;
}

void decode_isspacep(Decoding& d) {
  const std::string_view space =
      d.take_one({".global", ".local", ".shared", ".shared::cta", ".shared::cluster", ".const",
                  ".param", ".param::entry"});
  if (space.empty()) d.malformed("isspacep needs a state space");
  if (space == ".const") d.unsupported("isspacep.const");
  d.instr().variant = space == ".global"             ? kIsGlobal
                      : space == ".local"            ? kIsLocal
                      : space == ".shared::cluster"  ? kIsSharedCluster
                      : space.starts_with(".shared") ? kIsSharedCta
                                                     : kIsParam;
  d.dest(Type::kPred);
  d.source(Type::kB64);
  d.handler(is_space, InstrClass::kPredicate);
}

constexpr uint64_t kRankMask = uint64_t{0xff} << kSharedRankShift;

// The same place in the shared memory of the CTA of another rank. T is 64 bits wide for generic
// addresses too.
template <class T>
Step map_address(Warp& warp, const Instr& instr, LaneMask mask) {
  const T* from = lanes_of<T>(warp, instr.source(0));
  const uint32_t* rank = lanes_of<uint32_t>(warp, instr.source(1));
  T* to = dest_lanes<T>(warp, instr.dest(0));
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    to[lane] = static_cast<T>((from[lane] & ~static_cast<T>(kRankMask)) | (uint64_t{rank[lane]} + 1)
                                                                              << kSharedRankShift);
  }
  return Step::kNext;
}

void decode_mapa(Decoding& d) {
  d.take(".shared::cluster");
  const bool wide = d.take(".u64");
  if (!wide) d.take(".u32");
  const Type type = wide ? Type::kB64 : Type::kB32;
  d.dest(type);
  d.source(type);
  d.source(Type::kB32);
  d.handler(wide ? map_address<uint64_t> : map_address<uint32_t>, InstrClass::kMove);
}

template <class T>
Step rank_of_address(Warp& warp, const Instr& instr, LaneMask mask) {
  const T* from = lanes_of<T>(warp, instr.source(0));
  uint32_t* to = dest_lanes<uint32_t>(warp, instr.dest(0));
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const auto rank = static_cast<uint32_t>(from[lane] >> kSharedRankShift & 0xff);
    to[lane] = rank == 0 ? warp.cta->rank : rank - 1;
  }
  return Step::kNext;
}

void decode_getctarank(Decoding& d) {
  d.take(".shared::cluster");
  const bool wide = d.take(".u64");
  if (!wide) d.take(".u32");
  d.dest(Type::kB32);
  d.source(wide ? Type::kB64 : Type::kB32);
  d.handler(wide ? rank_of_address<uint64_t> : rank_of_address<uint32_t>, InstrClass::kMove);
}

constexpr Opcode kOpcodes[] = {
    {"cvta", decode_cvta},
    {"isspacep", decode_isspacep},
    {"mapa", decode_mapa},
    {"getctarank", decode_getctarank},
};

}  // namespace

const OpcodeFamily kAddressFamily{"address", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
