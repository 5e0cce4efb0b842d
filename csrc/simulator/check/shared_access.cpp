// Shared memory: bounds, initialisation, bytes in flight, races between barriers, bank conflicts.
#include <algorithm>

#include "simulator/check/runs.h"
#include "simulator/check/state.h"

namespace fused_peft::sim {

namespace {

constexpr uint64_t kOffsetMask = (uint64_t{1} << kSharedRankShift) - 1;

// The CTA that a shared address means; nullptr where the cluster has no such rank.
Cta* owner_of(Cta& mine, uint64_t address) {
  const uint64_t rank = address >> kSharedRankShift;
  if (rank == 0) return &mine;
  return rank <= mine.cluster->ctas.size() ? mine.cluster->ctas[rank - 1] : nullptr;
}

}  // namespace

enum class Mode { kRead, kWrite, kBeginAsync, kEndAsync };

// One access to the shared memory of one CTA.
struct SharedTouch {
  Checker::State& state;
  const Access& access;
  WarpState& me;
  CtaState& owner;
  bool remote;
  Mode mode;
  Stamp now;
  Stamp other{};
  uint64_t race_cell = 0;
  bool races = false;
  bool in_flight = false;
  Stamp unproxied{};     // a generic write that no proxy fence follows; mask 0: none
  uint32_t missing = 0;  // not 0: some byte that was read is not initialised

  // All cells of these ranges, which lie in the CTA's memory.
  void touch_runs(const Runs& runs) {
    SharedCell* cells = owner.cells.data();
    for (int i = 0; i < runs.count; ++i) {
      for (uint64_t at = runs.run[i].begin / kCellBytes; at <= (runs.run[i].end() - 1) / kCellBytes;
           ++at) {
        __builtin_prefetch(cells + at, 1);
      }
    }
    switch (mode) {
      case Mode::kRead: return touch_cells<Mode::kRead>(cells, runs);
      case Mode::kWrite: return touch_cells<Mode::kWrite>(cells, runs);
      case Mode::kBeginAsync: return touch_cells<Mode::kBeginAsync>(cells, runs);
      case Mode::kEndAsync: return touch_cells<Mode::kEndAsync>(cells, runs);
    }
  }

  template <Mode kMode>
  void touch_cells(SharedCell* cells, const Runs& runs) {
    const uint32_t interval = owner.interval;
    const bool check = state.racecheck;
    Stamp stamp = now;
    uint32_t not_written = 0;
    uint32_t in_the_way = 0;
    for (int i = 0; i < runs.count; ++i) {
      for_cells<kCellBytes>(runs.run[i].begin, runs.run[i].bytes,
                            [&](uint64_t index, uint32_t mask) {
                              SharedCell& cell = cells[index];
                              if (kMode != Mode::kEndAsync) in_the_way |= cell.in_flight & mask;
                              if (kMode == Mode::kRead || kMode == Mode::kWrite)
                                not_written |= mask & ~cell.init;
                              if (kMode == Mode::kWrite || kMode == Mode::kEndAsync)
                                cell.init |= mask;
                              if (kMode == Mode::kBeginAsync) cell.in_flight |= mask;
                              if (kMode == Mode::kEndAsync) cell.in_flight &= ~mask;
                              if (!check) return;
                              if (kMode == Mode::kRead && access.async_proxy)
                                check_proxy(cell, mask);
                              if (cell.interval != interval && cell.flags == 0 && !remote) {
                                // All earlier stamps, of the CTA's own warps, lie behind a barrier
                                // of all of them.
                                cell.interval = interval;
                                stamp.mask = mask;
                                set(cell.slots[0], stamp);
                                cell.slots[1].mask = cell.slots[2].mask = 0;
                                return;
                              }
                              check_race(cell, static_cast<uint32_t>(index), mask);
                            });
    }
    missing |= not_written;
    in_flight = in_flight || in_the_way != 0;
  }

  // The last generic writes of bytes that the async proxy reads, of this interval or an older one.
  void check_proxy(const SharedCell& cell, uint32_t mask) {
    for (const Stamp& stamp : cell.slots) {
      const bool generic_write =
          (stamp.kind() & kWriteStamp) != 0 && (stamp.kind() & kAsyncStamp) == 0;
      if ((stamp.mask & mask) == 0 || !generic_write) continue;
      if (owner.cluster->proxied[stamp.who] >= stamp.clock || unproxied.mask != 0) continue;
      unproxied = stamp;
    }
  }

  void check_race(SharedCell& cell, uint32_t index, uint32_t mask) {
    if (cell.interval != owner.interval) {
      cell.interval = owner.interval;
      if ((cell.flags & kRemoteTouched) == 0) {
        if ((cell.flags & kCrowdedCell) != 0) owner.crowded.erase(index);
        cell.flags = 0;
        for (Stamp& stamp : cell.slots) stamp.mask = 0;
      }
    }
    if (remote) cell.flags |= kRemoteTouched;
    now.mask = mask;
    const auto knows = [&](uint32_t who, uint32_t clock) {
      return me.clock.knows_near(who, clock);
    };
    const auto more = [&]() -> std::vector<Stamp>& {
      cell.flags |= kCrowdedCell;
      return owner.crowded[index];
    };
    Stamp met;
    if (touch(cell.slots, (cell.flags & kCrowdedCell) != 0, now, knows, more, &met) && !races) {
      if (access.kind == AccessKind::kWrite && (met.kind() & kWriteStamp) != 0 &&
          same_value(index * kCellBytes, mask)) {
        return;
      }
      races = true;
      other = met;
      race_cell = index * kCellBytes;
    }
  }

  // Whether what is stored to these bytes of the cell is what they hold.
  bool same_value(uint64_t cell, uint32_t mask) const {
    if (access.data == nullptr) return false;
    for (LaneMask left = access.lanes; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      const uint64_t at = access.address[lane] & kOffsetMask;
      const uint64_t end = std::min<uint64_t>(at + access.bytes, cell + kCellBytes);
      for (uint64_t byte = std::max(at, cell); byte < end; ++byte) {
        if ((mask >> (byte - cell) & 1) == 0) continue;
        if (owner.cta->shared[byte] != access.data[lane * access.bytes + (byte - at)]) return false;
      }
    }
    return true;
  }
};

namespace {

LaneMask lanes_of_rank(const uint64_t* address, LaneMask lanes, uint64_t rank) {
  return lanes_where(address, lanes, [&](uint64_t at) { return at >> kSharedRankShift == rank; });
}

bool bytes_set(const CtaState& owner, uint64_t offset, uint32_t bytes,
               uint32_t SharedCell::* field) {
  bool all = true;
  for_cells<kCellBytes>(offset, bytes, [&](uint64_t cell, uint32_t mask) {
    all = all && (mask & ~(owner.cells[cell].*field)) == 0;
  });
  return all;
}

void clear_init(CtaState& owner, uint64_t offset, uint32_t bytes) {
  for_cells<kCellBytes>(offset, bytes,
                        [&](uint64_t cell, uint32_t mask) { owner.cells[cell].init &= ~mask; });
}

}  // namespace

void Checker::State::report_touch(Warp& warp, const Instr& instr, LaneMask lanes,
                                  const SharedTouch& touch) {
  if (touch.in_flight && synccheck) {
    report(warp, instr, lanes, FindingKind::kAsyncNotWaited,
           std::string(verb(touch.access.kind)) +
               " shared memory that an asynchronous copy under way will write: nobody has waited "
               "for it");
  }
  if (touch.races && !touch.in_flight) {
    report_race(warp, instr, lanes, touch.access, touch.other, true, touch.race_cell);
  }
  if (touch.unproxied.mask != 0) {
    const uint32_t writer = touch.unproxied.instr();
    report(warp, instr, lanes, FindingKind::kProxyFence,
           "reads through the async proxy, without fence.proxy.async, what was written by " +
               launch.program->texts[writer] + " (" + source_of(*launch.program, writer) + ")");
  }
}

void Checker::State::report_shared_bounds(Warp& warp, const Instr& instr, const Access& access,
                                          LaneMask bad, const Cta* cta) {
  std::string text = std::string(verb(access.kind)) + " " + std::to_string(access.bytes) +
                     " bytes at shared address " + hex(access.address[std::countr_zero(bad)]);
  if (cta == nullptr) {
    text += ", whose rank the cluster does not have";
  } else if (state_of(*cta).ended) {
    text += " of a CTA that has ended";
  } else {
    text += ", outside the CTA's " + hex(kSharedStart) + " to " + hex(cta->shared_bytes);
  }
  report(warp, instr, bad, FindingKind::kOutOfBounds, text);
}

// The lanes of an access that mean one CTA's memory; returns those whose bytes were all
// initialised.
LaneMask Checker::State::access_cta(Warp& warp, const Instr& instr, const Access& access, Cta& cta,
                                    const uint64_t* offsets, LaneMask lanes, LaneMask stored,
                                    bool async) {
  WarpState& me = state_of(warp);
  CtaState& owner = state_of(cta);
  const bool writes = access.kind != AccessKind::kRead;
  const Mode mode = async ? Mode::kBeginAsync : writes ? Mode::kWrite : Mode::kRead;
  const uint32_t kind = stamp_kind(access) | (async ? uint32_t{kAsyncStamp} : 0);
  SharedTouch touch{*this,
                    access,
                    me,
                    owner,
                    &cta != warp.cta,
                    mode,
                    {me.clock.self, me.clock.now, 0, stamp_what(instr.index, kind)}};
  touch.touch_runs(Runs(offsets, access.bytes, lanes));
  LaneMask initialised = lanes;
  if (touch.missing != 0 && access.kind == AccessKind::kRead) {
    initialised = lanes_where(offsets, lanes, [&](uint64_t offset) {
      return bytes_set(owner, offset, access.bytes, &SharedCell::init);
    });
  } else if (touch.missing != 0 && access.kind == AccessKind::kAtomic) {
    // Its bits are set now; of which lanes they were missing is not known any more, so of all.
    initialised = 0;
  }
  if (writes && !async) {
    for (LaneMask tainted = lanes & ~stored; tainted != 0; tainted &= tainted - 1) {
      clear_init(owner, offsets[std::countr_zero(tainted)], access.bytes);
    }
  }
  report_touch(warp, instr, lanes, touch);
  if (racecheck && !access.relaxed && !async && !access.async_proxy)
    check_lanes(warp, instr, access, lanes);
  return touch.in_flight || touch.races ? lanes : initialised;  // one finding is enough
}

LaneMask Checker::State::access_shared(Warp& warp, const Instr& instr, const Access& access,
                                       LaneMask stored, LaneMask* valid, bool async) {
  LaneMask left = aligned_lanes(warp, instr, access);
  LaneMask carried = 0;
  LaneMask initialised = 0;
  Cta& mine = *warp.cta;
  const uint64_t* offsets = access.address;
  uint64_t low[kLanes];
  uint64_t ranks = 0;
  for (int lane = 0; lane < kLanes; ++lane) ranks |= access.address[lane] >> kSharedRankShift;
  if (ranks != 0) {
    for (int lane = 0; lane < kLanes; ++lane) low[lane] = access.address[lane] & kOffsetMask;
    offsets = low;
  }
  // Usually once: all lanes in the CTA's own memory.
  while (left != 0) {
    const uint64_t rank = access.address[std::countr_zero(left)] >> kSharedRankShift;
    LaneMask group = left;
    if (ranks != 0) group = lanes_of_rank(access.address, left, rank);
    left &= ~group;
    Cta* cta = rank == 0 ? &mine : owner_of(mine, rank << kSharedRankShift);
    LaneMask inside = 0;
    if (cta != nullptr && !state_of(*cta).ended && cta->shared_bytes >= access.bytes) {
      inside = lanes_within(offsets, group, kSharedStart, cta->shared_bytes - access.bytes);
    }
    if (inside != group) report_shared_bounds(warp, instr, access, group & ~inside, cta);
    if (inside == 0) continue;
    carried |= inside;
    initialised |= access_cta(warp, instr, access, *cta, offsets, inside, stored, async);
  }
  if (initcheck && access.kind == AccessKind::kAtomic && (carried & ~initialised) != 0) {
    report(warp, instr, carried & ~initialised, FindingKind::kUninitialised,
           "atomic operation on uninitialised shared memory");
  }
  if (valid != nullptr) *valid = initcheck ? initialised | ~carried : kFullMask;
  count_shared(warp, instr, access, carried);
  return carried;
}

void Checker::State::count_shared(Warp& warp, const Instr& instr, const Access& access,
                                  LaneMask lanes) {
  Tally& tally = state_of(*warp.cta).tally;
  const uint64_t bytes = uint64_t{access.bytes} * std::popcount(lanes);
  if (access.kind != AccessKind::kWrite) tally.shared_load_bytes += bytes;
  if (access.kind != AccessKind::kRead) tally.shared_store_bytes += bytes;
  if (access.async_proxy) return;
  const Wavefronts wavefronts = bank_wavefronts(access.address, access.bytes, lanes);
  tally.wavefronts[instr.index].done += wavefronts.done;
  tally.wavefronts[instr.index].ideal += wavefronts.ideal;
}

void Checker::State::report_unawaited(const Cta& cta, uint64_t cell, const Stamp& stamp) {
  const ClusterClocks& clocks = state_of(cta).cluster->clocks;
  const Cta& other = *cta.cluster->ctas[stamp.who / clocks.warps_per_cta];
  const bool write = (stamp.kind() & kWriteStamp) != 0;
  report(other.warps[stamp.who % clocks.warps_per_cta], launch.program->code[stamp.instr()], 1,
         FindingKind::kRace,
         std::string(write ? "write" : "read") + " of shared memory at " +
             hex(cell + uint64_t(std::countr_zero(stamp.mask))) + " of the CTA of rank " +
             std::to_string(cta.rank) + ", whose end nothing orders behind it");
}

// The end takes the memory away, as a write of all of it would: what other CTAs of the cluster did
// there must lie before it.
void Checker::end(Cta& cta) {
  CtaState& mine = state_of(cta);
  mine.ended = true;
  if (!state_->racecheck || cta.cluster->ctas.size() == 1) return;
  const uint32_t warps = mine.cluster->clocks.warps_per_cta;
  const auto foreign_and_unknown = [&](const Stamp& stamp) {
    if (stamp.mask == 0 || stamp.who / warps == cta.rank) return false;
    return std::none_of(cta.warps.begin(), cta.warps.end(), [&](const Warp& warp) {
      return state_of(warp).clock.knows_near(stamp.who, stamp.clock);
    });
  };
  for (size_t i = 0; i < mine.cells.size(); ++i) {
    const SharedCell& cell = mine.cells[i];
    if ((cell.flags & kRemoteTouched) == 0) continue;
    for (const Stamp& stamp : cell.slots)
      if (foreign_and_unknown(stamp)) state_->report_unawaited(cta, i * kCellBytes, stamp);
    if ((cell.flags & kCrowdedCell) == 0) continue;
    for (const Stamp& stamp : mine.crowded[static_cast<uint32_t>(i)])
      if (foreign_and_unknown(stamp)) state_->report_unawaited(cta, i * kCellBytes, stamp);
  }
}

LaneMask Checker::begin_async(Warp& warp, const Instr& instr, const Access& access) {
  return state_->access_shared(warp, instr, access, kFullMask, nullptr, true);
}

void Checker::end_async(Warp& warp, const Instr& instr, const Access& access,
                        LaneMask initialised) {
  WarpState& me = state_of(warp);
  LaneMask left = access.lanes;
  while (left != 0) {
    const uint64_t rank = access.address[std::countr_zero(left)] >> kSharedRankShift;
    const LaneMask group = lanes_of_rank(access.address, left, rank);
    left &= ~group;
    Cta* cta = owner_of(*warp.cta, rank << kSharedRankShift);
    CtaState& owner = state_of(*cta);
    SharedTouch touch{
        *state_,
        access,
        me,
        owner,
        cta != warp.cta,
        Mode::kEndAsync,
        {me.clock.self, me.clock.now, 0, stamp_what(instr.index, kWriteStamp | kAsyncStamp)}};
    uint64_t offsets[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) offsets[lane] = access.address[lane] & kOffsetMask;
    touch.touch_runs(Runs(offsets, access.bytes, group));
    for (LaneMask tainted = group & ~initialised; tainted != 0; tainted &= tainted - 1) {
      clear_init(owner, offsets[std::countr_zero(tainted)], access.bytes);
    }
  }
}

uint32_t Checker::initialised_bytes(Warp& warp, Space space, uint64_t address, uint32_t bytes) {
  uint32_t result = 0;
  if (space != Space::kShared) return static_cast<uint32_t>((uint64_t{1} << bytes) - 1);
  const CtaState& owner = state_of(*owner_of(*warp.cta, address));
  for (uint32_t i = 0; i < bytes; ++i) {
    if (bytes_set(owner, (address & kOffsetMask) + i, 1, &SharedCell::init)) result |= 1u << i;
  }
  return result;
}

}  // namespace fused_peft::sim
