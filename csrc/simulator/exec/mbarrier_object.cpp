// What lies behind an mbarrier: its phase, and the copies that complete on it.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "simulator/exec/async_copy.h"
#include "simulator/exec/mbarrier.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {
namespace {

void report(Warp& warp, const Instr& instr, int lane, FindingKind kind, const std::string& text) {
  warp.cta->launch->checker->report(warp, instr, LaneMask{1} << lane, kind, text);
}

}  // namespace

MbarrierTable& table_of(Cta& cta) {
  if (!cta.mbarriers) cta.mbarriers = std::make_shared<MbarrierTable>();
  return *static_cast<MbarrierTable*>(cta.mbarriers.get());
}

void write_word(const Mbarrier& barrier, const MbarrierPlace& place) {
  const uint64_t word = barrier.encode();
  std::memcpy(place.cta->shared + place.offset, &word, sizeof word);
  place.cta->progressed();
}

// A phase is over when nothing more is expected: the next begins.
void settle(Mbarrier& barrier, const MbarrierPlace& place) {
  if (barrier.pending == 0 && barrier.transactions == 0) {
    ++barrier.phase;
    barrier.pending = barrier.expected;
    Checker::drop(barrier.completed);
    barrier.completed = std::exchange(barrier.arriving, SyncVar{});
    std::move(barrier.landed.begin(), barrier.landed.end(), std::back_inserter(barrier.unobserved));
    barrier.landed.clear();
  }
  write_word(barrier, place);
}

// The copies of completed phases that nobody had waited for: their bytes are in flight no more.
void observe(Mbarrier& barrier, Checker& checker) {
  for (const std::unique_ptr<BulkLoad>& load : barrier.unobserved) {
    for (std::size_t first = 0; first < load->units.size(); first += kLanes) {
      uint64_t address[kLanes] = {};
      LaneMask lanes = 0, initialised = 0;
      for (std::size_t i = 0; i < std::min<std::size_t>(kLanes, load->units.size() - first); ++i) {
        const CopyUnit& unit = load->units[first + i];
        address[i] = shared_address(*load->target, unit.shared);
        lanes |= LaneMask{!unit.skip} << i;
        initialised |= LaneMask{unit.initialised} << i;
      }
      if (lanes == 0 || load->combine) continue;
      Access access{Space::kShared, AccessKind::kWrite, load->unit_bytes, lanes, address};
      access.async_proxy = true;
      checker.end_async(*load->issuer, *load->instr, access, initialised);
    }
    checker.release(*load->issuer, barrier.completed);
  }
  barrier.unobserved.clear();
}

// Some of what is in flight lands, now that a thread waits for it: all, or as the dice fall.
void land_some(Warp& warp, Mbarrier& barrier, const MbarrierPlace& place) {
  const bool all = warp.cta->launch->options.async_timing != AsyncTiming::kRandom;
  for (std::size_t i = barrier.in_flight.size(); i-- > 0;) {
    if (all || i == 0 || moves_early(warp)) land(barrier, place, i);
  }
}

// Bit 63: the phase's parity; pending and expected arrivals; the tx-count.
uint64_t Mbarrier::encode() const {
  return (phase & 1) << 63 | (uint64_t(transactions) & 0x1fffff) << 40 |
         uint64_t(pending & kMaxArrivals) << 20 | (expected & kMaxArrivals);
}

uint64_t shared_address(const Cta& cta, uint64_t offset) {
  return (uint64_t{cta.rank} + 1) << kSharedRankShift | offset;
}

bool place_of(Warp& warp, const Instr& instr, uint64_t address, bool generic, int lane,
              MbarrierPlace* place) {
  if (generic && split_generic(address) != Space::kShared) {
    report(warp, instr, lane, FindingKind::kOutOfBounds,
           "the address of the mbarrier is not in shared memory");
    return false;
  }
  const uint64_t rank = address >> kSharedRankShift;
  const std::vector<Cta*>& ctas = warp.cta->cluster->ctas;
  if (rank > ctas.size()) {
    report(warp, instr, lane, FindingKind::kOutOfBounds,
           "the mbarrier's CTA is not in the cluster");
    return false;
  }
  place->cta = rank == 0 ? warp.cta : ctas[rank - 1];
  place->offset = uint32_t(address & ((uint64_t{1} << kSharedRankShift) - 1));
  place->address = address;
  return true;
}

bool touch_mbarrier(Warp& warp, const Instr& instr, const MbarrierPlace& place, int lane,
                    AccessKind kind) {
  constexpr uint32_t kWordBytes = 8;
  uint64_t address[kLanes] = {};
  address[lane] = place.address;
  const LaneMask lanes = LaneMask{1} << lane;
  LaneMask valid = 0;
  Access access{Space::kShared, kind, kWordBytes, lanes, address};
  access.relaxed = kind != AccessKind::kWrite;
  return warp.cta->launch->checker->access(warp, instr, access, lanes, &valid) != 0;
}

Mbarrier* find_mbarrier(Warp& warp, const Instr& instr, const MbarrierPlace& place, int lane) {
  MbarrierTable& table = table_of(*place.cta);
  const auto entry = table.find(place.offset);
  if (entry == table.end()) {
    report(warp, instr, lane, FindingKind::kUninitialised,
           "no mbarrier.init has been executed at this address");
    return nullptr;
  }
  uint64_t word = 0;
  std::memcpy(&word, place.cta->shared + place.offset, sizeof word);
  if (word != entry->second.encode()) {
    report(warp, instr, lane, FindingKind::kOther,
           "the mbarrier has been overwritten by an ordinary store or copy");
    write_word(entry->second, place);
  }
  return &entry->second;
}

void BulkLoad::move() const {
  for (const CopyUnit& unit : units) {
    if (unit.skip) continue;
    std::byte* const to = target->shared + unit.shared;
    if (combine) {
      combine(to, unit.host, unit_bytes);
      continue;
    }
    if (unit.begin == 0 && unit.end == unit_bytes) {
      std::memcpy(to, unit.host, unit_bytes);
      continue;
    }
    std::memcpy(to, fill, kUnitBytes);
    if (unit.begin < unit.end)
      std::memcpy(to + unit.begin, unit.host + unit.begin, unit.end - unit.begin);
  }
}

void complete_transactions(Mbarrier& barrier, const MbarrierPlace& place, int64_t bytes) {
  barrier.transactions -= bytes;
  settle(barrier, place);
}

void land(Mbarrier& barrier, const MbarrierPlace& place, std::size_t which) {
  const auto at = barrier.in_flight.begin() + std::ptrdiff_t(which);
  std::unique_ptr<BulkLoad> load = std::move(*at);
  barrier.in_flight.erase(at);
  load->move();
  const auto bytes = int64_t(load->bytes);
  barrier.landed.push_back(std::move(load));
  complete_transactions(barrier, place, bytes);
}

bool moves_early(Warp& warp) {
  const Options& options = warp.cta->launch->options;
  if (options.async_timing != AsyncTiming::kRandom)
    return options.async_timing == AsyncTiming::kEarly;
  uint64_t hash =
      options.seed * 0x9e3779b97f4a7c15u + warp.uid * 0xbf58476d1ce4e5b9u + ++async_of(warp).issued;
  hash = (hash ^ (hash >> 31)) * 0x94d049bb133111ebu;
  return (hash >> 60 & 1) != 0;
}

}  // namespace fused_peft::sim
