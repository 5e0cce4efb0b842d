// cp.async, commit_group, wait_group and wait_all (PTX ISA 9.7.9.25).
//
// A copy is in flight until the lane that issued it waits for its group. When within that time the
// data really moves is Options::async_timing's.
#include "simulator/exec/async_copy.h"

#include <algorithm>
#include <cstring>

#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {

namespace {

enum Fill : uint32_t { kWhole, kSourceSize, kIgnoreSource };

struct CopyForm {
  uint32_t bytes = 0;
  Fill fill = kWhole;
  int64_t to_offset = 0;
};

bool lands_early(const Warp& warp, uint64_t number) {
  const Options& options = warp.cta->launch->options;
  if (options.async_timing != AsyncTiming::kRandom)
    return options.async_timing == AsyncTiming::kEarly;
  uint64_t hash = options.seed * 0x9e3779b97f4a7c15u + warp.uid * 0xbf58476d1ce4e5b9u + number;
  hash = (hash ^ (hash >> 31)) * 0x94d049bb133111ebu;
  return (hash >> 60 & 1) != 0;
}

template <uint32_t kBytes>
void land_whole(const AsyncCopy& copy, std::byte* const* to, LaneMask lanes) {
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    std::memcpy(to[lane], copy.from[lane], kBytes);
  }
}

void land(Warp& warp, AsyncCopy& copy, LaneMask lanes) {
  lanes &= ~copy.landed;
  if (lanes == 0) return;
  copy.landed |= lanes;
  std::byte* to[kLanes];
  host_addresses(warp, Space::kShared, copy.to.data(), lanes, to);
  for (LaneMask left = copy.partial & lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    std::memcpy(to[lane], copy.from[lane], copy.filled[lane]);
    std::memset(to[lane] + copy.filled[lane], 0, copy.bytes - copy.filled[lane]);
  }
  const LaneMask whole = lanes & ~copy.partial;
  switch (copy.bytes) {
    case 4: return land_whole<4>(copy, to, whole);
    case 8: return land_whole<8>(copy, to, whole);
    default: return land_whole<16>(copy, to, whole);
  }
}

void complete(Warp& warp, AsyncCopy& copy, LaneMask lanes) {
  if (lanes == 0) return;
  land(warp, copy, lanes);
  const Access access{Space::kShared, AccessKind::kWrite, copy.bytes, lanes, copy.to.data()};
  warp.cta->launch->checker->end_async(warp, *copy.instr, access, copy.initialised);
  copy.lanes &= ~lanes;
  warp.cta->progressed();
}

// Completes the copies of `mask` whose group has a smaller number than end[lane].
void complete_below(Warp& warp, LaneMask mask, const uint64_t* end) {
  if (warp.async == nullptr) return;
  WarpAsync& async = async_of(warp);
  for (AsyncCopy& copy : async.copies) {
    LaneMask done = 0;
    for (int lane = 0; lane < kLanes; ++lane) done |= LaneMask{copy.group < end[lane]} << lane;
    complete(warp, copy, copy.lanes & mask & done);
  }
  while (!async.copies.empty() && async.copies.front().lanes == 0) async.copies.pop_front();
}

// Checks the reads of global memory; lanes with one number of bytes at a time. Returns the lanes
// that may go on.
LaneMask check_sources(Warp& warp, const Instr& instr, const AsyncCopy& copy,
                       const uint64_t* address, LaneMask mask, LaneMask* initialised) {
  Checker& checker = *warp.cta->launch->checker;
  LaneMask good = 0;
  *initialised = 0;
  while (mask != 0) {
    const uint32_t bytes = copy.filled[std::countr_zero(mask)];
    LaneMask same = 0;
    for (int lane = 0; lane < kLanes; ++lane) same |= LaneMask{copy.filled[lane] == bytes} << lane;
    same &= mask;
    mask &= ~same;
    LaneMask valid = same;
    if (bytes != 0) {
      const Access access{Space::kGlobal, AccessKind::kRead, bytes,     same, address,
                          false,          nullptr,           copy.bytes};
      same = checker.access(warp, instr, access, 0, &valid);
    }
    good |= same;
    *initialised |= valid;
  }
  return good;
}

// How many bytes of each lane come from global memory. Returns the lanes for which that is known.
LaneMask set_filled(const Warp& warp, const Instr& instr, const CopyForm& form, AsyncCopy& copy) {
  copy.filled.fill(static_cast<uint8_t>(form.bytes));
  copy.partial = 0;
  if (form.fill == kWhole) return kFullMask;
  if (form.fill == kSourceSize) {
    const uint32_t* size = lanes_of<uint32_t>(warp, instr.source(2));
    for (int lane = 0; lane < kLanes; ++lane) {
      copy.filled[lane] = static_cast<uint8_t>(std::min(size[lane], form.bytes));
    }
  } else {
    const LaneMask ignored = predicate(warp, instr.source(2));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (ignored >> lane & 1) copy.filled[lane] = 0;
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    copy.partial |= LaneMask{copy.filled[lane] < form.bytes} << lane;
  }
  return valid_lanes(warp, instr.source(2));
}

// Lanes of `mask` whose copies belong to a group of the same number as the first one's: mostly all.
LaneMask lanes_of_group(const WarpAsync& async, LaneMask mask) {
  const uint64_t group = async.committed[std::countr_zero(mask)];
  LaneMask lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    lanes |= LaneMask{async.committed[lane] == group} << lane;
  return lanes & mask;
}

Step copy_async(Warp& warp, const Instr& instr, LaneMask mask) {
  const CopyForm& form = *static_cast<const CopyForm*>(instr.extra);
  Checker& checker = *warp.cta->launch->checker;
  WarpAsync& async = async_of(warp);
  check_address(warp, instr, instr.source(0), mask);
  check_address(warp, instr, instr.source(1), mask);
  while (mask != 0) {
    LaneMask lanes = lanes_of_group(async, mask);
    AsyncCopy& copy = async.copies.emplace_back();
    copy.instr = &instr;
    copy.bytes = form.bytes;
    copy.group = async.committed[std::countr_zero(mask)];
    mask &= ~lanes;
    lane_addresses(warp, instr.source(0), form.to_offset, copy.to.data());
    uint64_t from[kLanes];
    lane_addresses(warp, instr.source(1), instr.imm, from);
    for (int lane = 0; lane < kLanes; ++lane) {
      copy.from[lane] = reinterpret_cast<const std::byte*>(from[lane]);
      __builtin_prefetch(copy.from[lane]);
    }
    const LaneMask known = set_filled(warp, instr, form, copy) & valid_guard(warp, instr);
    LaneMask initialised = 0;
    lanes = check_sources(warp, instr, copy, from, lanes, &initialised);
    const Access access{Space::kShared, AccessKind::kWrite, form.bytes, lanes, copy.to.data()};
    copy.lanes = lanes == 0 ? 0 : checker.begin_async(warp, instr, access);
    copy.initialised = initialised & known;
    if (lands_early(warp, async.issued++)) land(warp, copy, copy.lanes);
    if (copy.lanes == 0) async.copies.pop_back();
  }
  return Step::kNext;
}

Step commit_group(Warp& warp, const Instr&, LaneMask mask) {
  WarpAsync& async = async_of(warp);
  for (LaneMask left = mask; left != 0; left &= left - 1) ++async.committed[std::countr_zero(left)];
  return Step::kNext;
}

// imm: the number of the latest groups that may stay under way.
Step wait_group(Warp& warp, const Instr& instr, LaneMask mask) {
  const WarpAsync& async = async_of(warp);
  const auto pending = static_cast<uint64_t>(instr.imm);
  uint64_t end[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    end[lane] = async.committed[lane] - std::min(pending, async.committed[lane]);
  }
  complete_below(warp, mask, end);
  return Step::kNext;
}

Step wait_all(Warp& warp, const Instr&, LaneMask mask) {
  complete_async_copies(warp, mask);
  return Step::kNext;
}

void decode_copy(Decoding& d) {
  d.take_one({".ca", ".cg"});
  d.take_one({".shared", ".shared::cta"});
  if (!d.take(".global")) d.malformed("cp.async copies from .global");
  const bool policy = take_cache_hints(d);
  CopyForm form;
  d.address();
  form.to_offset = d.instr().imm;
  d.address();
  const int64_t bytes = d.immediate();
  if (bytes != 4 && bytes != 8 && bytes != 16) d.malformed("cp.async copies 4, 8 or 16 bytes");
  form.bytes = static_cast<uint32_t>(bytes);
  if (d.operands_left() > (policy ? 1 : 0)) {
    const bool is_predicate = d.next_width() == 0;
    form.fill = is_predicate ? kIgnoreSource : kSourceSize;
    d.source(is_predicate ? Type::kPred : Type::kB32);
  }
  if (policy) d.source(Type::kB64);
  d.handler(copy_async, InstrClass::kAsyncCopy);
  d.keep(std::make_shared<CopyForm>(form));
}

void decode_cp(Decoding& d) {
  if (d.take(".reduce")) return decode_as(d, "cp.reduce");
  if (!d.take(".async")) d.unsupported("cp without .async");
  if (d.take(".bulk")) return decode_as(d, "cp.async.bulk");
  if (d.take(".mbarrier")) return decode_as(d, "cp.async.mbarrier");
  if (d.take(".commit_group")) {
    d.handler(commit_group, InstrClass::kAsyncCopy);
  } else if (d.take(".wait_group")) {
    d.instr().imm = d.immediate();
    d.handler(wait_group, InstrClass::kAsyncCopy);
  } else if (d.take(".wait_all")) {
    d.handler(wait_all, InstrClass::kAsyncCopy);
  } else {
    decode_copy(d);
  }
}

constexpr Opcode kOpcodes[] = {{"cp", decode_cp}};

}  // namespace

void complete_async_copies(Warp& warp, LaneMask lanes) {
  uint64_t end[kLanes];
  std::fill(end, end + kLanes, ~uint64_t{0});
  complete_below(warp, lanes, end);
}

const OpcodeFamily kAsyncCopyFamily{"cp.async", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
