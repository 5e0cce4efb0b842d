// cp.async.bulk, cp.reduce.async.bulk and bulk groups (PTX ISA 9.7.9.25.4).
//
// A copy into shared memory is in flight until a thread has seen the phase of its mbarrier
// complete; one out of it reads until its thread waits for the bulk group. Within that time
// Options::async_timing says when the data moves.
#include "simulator/exec/bulk.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>

#include "simulator/exec/async_copy.h"
#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {
namespace {

Checker& checker_of(const Warp& warp) { return *warp.cta->launch->checker; }

// Up to 32 units as one Access of 32 lanes.
struct Pieces {
  uint64_t address[kLanes] = {};
  LaneMask lanes = 0;
};

template <class Act>
void for_pieces(std::size_t count, Act act) {
  for (std::size_t first = 0; first < count; first += kLanes) {
    act(first, std::min<std::size_t>(kLanes, count - first));
  }
}

uint64_t host_address(const CopyUnit& unit) {
  return reinterpret_cast<uint64_t>(unit.host) + unit.begin;
}

// Checks the units' global (or remote shared) bytes; sets `skip` and `initialised`.
void check_host_side(Warp& warp, const Instr& instr, std::vector<CopyUnit>& units,
                     AccessKind kind) {
  for_pieces(units.size(), [&](std::size_t first, std::size_t count) {
    LaneMask left = 0;
    uint64_t address[kLanes] = {};
    for (std::size_t i = 0; i < count; ++i) {
      const CopyUnit& unit = units[first + i];
      address[i] = host_address(unit);
      left |= LaneMask{!unit.skip && unit.begin < unit.end} << i;
    }
    while (left != 0) {
      const CopyUnit& model = units[first + std::size_t(std::countr_zero(left))];
      const auto bytes = uint32_t(model.end - model.begin);
      LaneMask same = 0, stored = 0, valid = 0;
      for (std::size_t i = 0; i < count; ++i) {
        const CopyUnit& unit = units[first + i];
        same |= LaneMask{uint32_t(unit.end - unit.begin) == bytes} << i;
        stored |= LaneMask{unit.initialised} << i;
      }
      same &= left;
      left &= ~same;
      Access access{Space::kGlobal, kind, bytes, same, address};
      access.align = 1;
      access.relaxed = kind == AccessKind::kAtomic;
      const LaneMask good = checker_of(warp).access(warp, instr, access, stored, &valid);
      for (std::size_t i = 0; i < count; ++i) {
        if ((same >> i & 1) == 0) continue;
        if ((good >> i & 1) == 0) units[first + i].skip = true;
        if (kind == AccessKind::kRead) units[first + i].initialised = valid >> i & 1;
      }
    }
  });
}

void check_shared_reads(Warp& warp, const Instr& instr, std::vector<CopyUnit>& units) {
  for_pieces(units.size(), [&](std::size_t first, std::size_t count) {
    Pieces pieces;
    for (std::size_t i = 0; i < count; ++i) {
      pieces.address[i] = shared_address(*warp.cta, units[first + i].shared);
      pieces.lanes |= LaneMask{!units[first + i].skip} << i;
    }
    LaneMask valid = 0;
    Access access{Space::kShared, AccessKind::kRead, kUnitBytes, pieces.lanes, pieces.address};
    access.async_proxy = true;
    const LaneMask good = checker_of(warp).access(warp, instr, access, 0, &valid);
    for (std::size_t i = 0; i < count; ++i) {
      units[first + i].skip |= (good >> i & 1) == 0;
      units[first + i].initialised = valid >> i & 1;
    }
  });
}

void move_store(Warp& warp, BulkStore& store) {
  check_shared_reads(warp, *store.instr, store.units);
  check_host_side(warp, *store.instr, store.units,
                  store.combine ? AccessKind::kAtomic : AccessKind::kWrite);
  for (const CopyUnit& unit : store.units) {
    if (unit.skip || unit.begin >= unit.end) continue;
    const std::byte* const from = warp.cta->shared + unit.shared + unit.begin;
    const std::size_t bytes = unit.end - unit.begin;
    if (store.combine) {
      store.combine(unit.host + unit.begin, from, bytes);
    } else {
      std::memcpy(unit.host + unit.begin, from, bytes);
    }
  }
  store.moved = true;
  warp.cta->progressed();
}

Step commit_group(Warp& warp, const Instr&, LaneMask mask) {
  BulkGroups& groups = bulk_groups_of(warp);
  for (; mask != 0; mask &= mask - 1) ++groups.committed[std::countr_zero(mask)];
  return Step::kNext;
}

// imm: the number of the latest groups that may stay under way. Their sources have been read behind
// wait_group.read, and what they write is visible behind wait_group; both are as late as it is
// allowed here.
Step wait_group(Warp& warp, const Instr& instr, LaneMask mask) {
  BulkGroups& groups = bulk_groups_of(warp);
  for (BulkStore& store : groups.stores) {
    if ((mask >> store.lane & 1) == 0) continue;
    const uint64_t committed = groups.committed[store.lane];
    if (store.group + uint64_t(instr.imm) < committed && !store.moved) move_store(warp, store);
  }
  while (!groups.stores.empty() && groups.stores.front().moved) groups.stores.pop_front();
  return Step::kNext;
}

struct Operands {
  uint64_t to[kLanes], from[kLanes], barrier[kLanes];
};

// Units of `bytes` bytes side by side.
std::vector<CopyUnit> row_of_units(uint64_t shared, uint64_t host, uint64_t bytes) {
  std::vector<CopyUnit> units(bytes / kUnitBytes);
  for (std::size_t i = 0; i < units.size(); ++i) {
    units[i].shared = shared + i * kUnitBytes;
    units[i].host = reinterpret_cast<std::byte*>(host + i * kUnitBytes);
  }
  return units;
}

bool sound(Warp& warp, const Instr& instr, int lane, uint64_t to, uint64_t from, uint64_t bytes) {
  if (bytes % kUnitBytes == 0 && to % kUnitBytes == 0 && from % kUnitBytes == 0) return true;
  checker_of(warp).report(
      warp, instr, LaneMask{1} << lane, FindingKind::kMisaligned,
      "a bulk copy's addresses and size are multiples of 16: size " + std::to_string(bytes));
  return false;
}

// The CTAs that a load goes to: the one of the destination address, or those of the multicast mask.
void for_targets(Warp& warp, const Instr& instr, int lane, const MbarrierPlace& to,
                 const std::function<void(Cta&)>& act) {
  const BulkForm& form = bulk_form(instr);
  if (form.multicast < 0) return act(*to.cta);
  const uint16_t mask = lanes_of<uint16_t>(warp, instr.source(form.multicast))[lane];
  const std::vector<Cta*>& ctas = warp.cta->cluster->ctas;
  if (mask >> ctas.size() != 0) {
    checker_of(warp).report(warp, instr, LaneMask{1} << lane, FindingKind::kOutOfBounds,
                            "the multicast mask names CTAs that the cluster does not have");
  }
  for (std::size_t i = 0; i < ctas.size(); ++i) {
    if (mask >> i & 1) act(*ctas[i]);
  }
}

Step copy_bulk(Warp& warp, const Instr& instr, LaneMask mask) {
  const BulkForm& form = bulk_form(instr);
  Operands operands;
  lane_addresses(warp, instr.source(0), form.to_offset, operands.to);
  lane_addresses(warp, instr.source(1), form.from_offset, operands.from);
  if (form.barrier >= 0)
    lane_addresses(warp, instr.source(form.barrier), form.barrier_offset, operands.barrier);
  check_address(warp, instr, instr.source(0), mask);
  check_address(warp, instr, instr.source(1), mask);
  for (LaneMask left = distinct_lanes(warp, instr, mask); left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const uint64_t bytes = lanes_of<uint32_t>(warp, instr.source(form.size))[lane];
    if (!sound(warp, instr, lane, operands.to[lane], operands.from[lane], bytes) || bytes == 0)
      continue;
    MbarrierPlace place;
    if (form.kind == BulkKind::kStore) {
      if (!place_of(warp, instr, operands.from[lane], false, lane, &place)) continue;
      BulkStore store;
      store.combine = form.combine;
      store.units = row_of_units(place.offset, operands.to[lane], bytes);
      issue_store(warp, instr, lane, std::move(store));
      continue;
    }
    if (!place_of(warp, instr, operands.to[lane], false, lane, &place)) continue;
    uint64_t host = operands.from[lane];
    const bool within = form.kind == BulkKind::kSharedToShared;
    MbarrierPlace source;
    if (within) {
      if (!place_of(warp, instr, host, false, lane, &source)) continue;
      host = reinterpret_cast<uint64_t>(source.cta->shared + source.offset);
    }
    for_targets(warp, instr, lane, place, [&](Cta& target) {
      // The mbarrier lies at the same offset in each of a multicast's CTAs.
      MbarrierPlace barrier;
      if (!place_of(warp, instr, operands.barrier[lane], false, lane, &barrier)) return;
      const uint64_t at =
          form.multicast < 0 ? operands.barrier[lane] : shared_address(target, barrier.offset);
      issue_load(warp, instr, lane, target, at, row_of_units(place.offset, host, bytes),
                 within ? Space::kShared : Space::kGlobal, nullptr);
    });
  }
  return Step::kNext;
}

Step prefetch(Warp& warp, const Instr& instr, LaneMask mask) {
  check_address(warp, instr, instr.source(0), mask);
  return Step::kNext;
}

void decode_prefetch(Decoding& d) {
  d.take_one({".L2", ".L2.global"});
  if (!d.take(".global")) d.malformed("a prefetch is of .global");
  const bool policy = d.take(".L2::cache_hint");
  d.address();
  d.source(Type::kB32);
  if (policy) d.source(Type::kB64);
  d.handler(prefetch, InstrClass::kAsyncCopy);
}

void decode_copy(Decoding& d, BulkForm form) {
  bool multicast = false;
  const bool policy = take_bulk_qualifiers(d, form, &multicast);
  if (form.kind == BulkKind::kSharedToShared && form.reduction != Reduction::kNone) {
    d.unsupported("a bulk reduction into shared memory");
  }
  d.address();
  form.to_offset = d.instr().imm;
  d.address();
  form.from_offset = d.instr().imm;
  form.size = d.instr().num_sources;
  d.source(Type::kB32);
  if (form.kind != BulkKind::kStore) {
    form.barrier = d.instr().num_sources;
    d.address();
    form.barrier_offset = d.instr().imm;
  }
  if (multicast) {
    form.multicast = d.instr().num_sources;
    d.source(Type::kB16);
  }
  if (policy) d.source(Type::kB64);
  d.handler(copy_bulk, InstrClass::kAsyncCopy);
  d.keep(std::make_shared<BulkForm>(form));
}

void decode_bulk(Decoding& d) {
  if (d.take(".commit_group")) return d.handler(commit_group, InstrClass::kAsyncCopy);
  if (d.take(".wait_group")) {
    d.take(".read");
    d.instr().imm = d.immediate();
    return d.handler(wait_group, InstrClass::kAsyncCopy);
  }
  const bool is_prefetch = d.take(".prefetch");
  if (d.take(".tensor")) return decode_tensor_copy(d, {}, is_prefetch);
  if (is_prefetch) return decode_prefetch(d);
  if (d.has(".cp_mask")) d.unsupported(".cp_mask");
  decode_copy(d, {});
}

// cp.reduce.async.bulk...
void decode_bulk_reduction(Decoding& d) {
  if (!d.take(".async") || !d.take(".bulk")) d.malformed(".async.bulk is missing");
  BulkForm form;
  take_reduction(d, form);
  if (d.take(".tensor")) return decode_tensor_copy(d, form, false);
  d.take(".noftz");
  form.combine = find_reduction(form.reduction, d.need_type());
  if (form.combine == nullptr) d.malformed("no such reduction of this type");
  decode_copy(d, form);
}

constexpr Opcode kOpcodes[] = {{"cp.async.bulk", decode_bulk},
                               {"cp.reduce", decode_bulk_reduction}};

}  // namespace

BulkGroups& bulk_groups_of(Warp& warp) {
  WarpAsync& async = async_of(warp);
  if (!async.bulk) async.bulk = std::make_shared<BulkGroups>();
  return *static_cast<BulkGroups*>(async.bulk.get());
}

bool take_bulk_qualifiers(Decoding& d, BulkForm& form, bool* multicast) {
  const auto space = [&] { return d.take_one({".shared::cluster", ".shared::cta", ".global"}); };
  const std::string_view to = space(), from = space();
  const bool to_shared = to.starts_with(".shared"), from_shared = from.starts_with(".shared");
  if (to.empty() || from.empty() || (!to_shared && !from_shared)) {
    d.malformed("a bulk copy goes between .global and .shared::cta or .shared::cluster");
  }
  form.kind = !to_shared    ? BulkKind::kStore
              : from_shared ? BulkKind::kSharedToShared
                            : BulkKind::kLoad;
  form.to_cluster = to == ".shared::cluster";
  const bool group = d.take(".bulk_group"), barrier = d.take(".mbarrier::complete_tx::bytes");
  if (group == barrier || group != (form.kind == BulkKind::kStore)) {
    d.malformed(
        "a bulk copy completes by .bulk_group (out of shared memory) or "
        ".mbarrier::complete_tx::bytes");
  }
  *multicast = d.take(".multicast::cluster");
  return d.take(".L2::cache_hint");
}

void take_reduction(Decoding& d, BulkForm& form) {
  static constexpr std::pair<std::string_view, Reduction> kNames[] = {
      {".add", Reduction::kAdd}, {".min", Reduction::kMin}, {".max", Reduction::kMax},
      {".inc", Reduction::kInc}, {".dec", Reduction::kDec}, {".and", Reduction::kAnd},
      {".or", Reduction::kOr},   {".xor", Reduction::kXor}};
  for (const auto& [name, reduction] : kNames) {
    if (d.take(name)) form.reduction = reduction;
  }
  if (form.reduction == Reduction::kNone) d.malformed("the operation of the reduction is missing");
}

LaneMask distinct_lanes(const Warp& warp, const Instr& instr, LaneMask mask) {
  LaneMask kept = 0;
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    bool is_new = true;
    for (LaneMask others = kept; others != 0 && is_new; others &= others - 1) {
      const int other = std::countr_zero(others);
      bool same = true;
      for (int i = 0; i < instr.num_sources && same; ++i) {
        const Operand& operand = instr.source(i);
        const std::byte* const base = warp.bases[operand.space] + operand.offset;
        same = std::memcmp(base + lane * operand.bytes, base + other * operand.bytes,
                           operand.bytes) == 0;
      }
      is_new = !same;
    }
    if (is_new) kept |= LaneMask{1} << lane;
  }
  return kept;
}

void issue(Warp& warp, const Instr& instr, int lane, const MbarrierPlace& place,
           std::unique_ptr<BulkLoad> load) {
  if (!touch_mbarrier(warp, instr, place, lane, AccessKind::kAtomic)) return;
  Mbarrier* const barrier = find_mbarrier(warp, instr, place, lane);
  if (barrier == nullptr) return;
  load->issuer = &warp;
  load->instr = &instr;
  std::vector<CopyUnit>& units = load->units;
  for_pieces(units.size(), [&](std::size_t first, std::size_t count) {
    Pieces pieces;
    LaneMask stored = 0;
    for (std::size_t i = 0; i < count; ++i) {
      pieces.address[i] = shared_address(*load->target, units[first + i].shared);
      pieces.lanes |= LaneMask{!units[first + i].skip} << i;
      stored |= LaneMask{units[first + i].initialised} << i;
    }
    if (pieces.lanes == 0) return;
    Access access{Space::kShared, AccessKind::kWrite, load->unit_bytes, pieces.lanes,
                  pieces.address};
    access.async_proxy = true;
    Checker& checker = checker_of(warp);
    LaneMask good = 0, valid = 0;
    if (load->combine) {
      // A relaxed atomic operation: others may be under way on the same bytes.
      access.kind = AccessKind::kAtomic;
      access.relaxed = true;
      good = checker.access(warp, instr, access, stored, &valid);
    } else {
      good = checker.begin_async(warp, instr, access);
    }
    for (std::size_t i = 0; i < count; ++i) units[first + i].skip |= (good >> i & 1) == 0;
  });
  barrier->in_flight.push_back(std::move(load));
  if (moves_early(warp)) land(*barrier, place, barrier->in_flight.size() - 1);
}

void issue_load(Warp& warp, const Instr& instr, int lane, Cta& target, uint64_t barrier_address,
                std::vector<CopyUnit> units, Space from, const std::byte* fill) {
  MbarrierPlace place;
  if (!place_of(warp, instr, barrier_address, false, lane, &place)) return;
  if (from == Space::kGlobal) check_host_side(warp, instr, units, AccessKind::kRead);
  auto load = std::make_unique<BulkLoad>();
  load->target = &target;
  load->bytes = units.size() * kUnitBytes;
  if (fill) std::memcpy(load->fill, fill, kUnitBytes);
  load->units = std::move(units);
  issue(warp, instr, lane, place, std::move(load));
}

void issue_store(Warp& warp, const Instr& instr, int lane, BulkStore store) {
  BulkGroups& groups = bulk_groups_of(warp);
  store.instr = &instr;
  store.lane = lane;
  store.group = groups.committed[lane];
  groups.stores.push_back(std::move(store));
  if (moves_early(warp)) move_store(warp, groups.stores.back());
}

const OpcodeFamily kBulkFamily{"cp.async.bulk", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
