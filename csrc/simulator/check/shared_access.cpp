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
  uint32_t missing = 0;  // not 0: some byte that was read is not initialised

  // All cells of these ranges, which lie in the CTA's memory.
  void touch_runs(const Runs& runs) {
    SharedCell* cells = owner.cells.data();
    for (int i = 0; i < runs.count; ++i) {
      for (uint64_t at = runs.run[i].begin / kCellBytes; at <= (runs.run[i].end() - 1) / kCellBytes; ++at) {
        __builtin_prefetch(cells + at, 1);
      }
    }
    for (int i = 0; i < runs.count; ++i) {
      for_cells<kCellBytes>(runs.run[i].begin, runs.run[i].bytes, [&](uint64_t index, uint32_t mask) {
        touch_cell(cells[index], static_cast<uint32_t>(index), mask);
      });
    }
  }

  void touch_cell(SharedCell& cell, uint32_t index, uint32_t mask) {
    switch (mode) {
      case Mode::kRead:
        in_flight |= (cell.in_flight & mask) != 0;
        missing |= mask & ~cell.init;
        break;
      case Mode::kWrite:
        in_flight |= (cell.in_flight & mask) != 0;
        missing |= mask & ~cell.init;  // for atomics
        cell.init |= mask;
        break;
      case Mode::kBeginAsync:
        in_flight |= (cell.in_flight & mask) != 0;
        cell.in_flight |= mask;
        break;
      case Mode::kEndAsync:
        cell.in_flight &= ~mask;
        cell.init |= mask;
        break;
    }
    if (!state.racecheck) return;
    if (cell.interval != owner.interval) {
      cell.interval = owner.interval;
      // All earlier stamps of the CTA's own warps lie behind a barrier of all of them.
      if ((cell.flags & kRemoteTouched) == 0) {
        if ((cell.flags & kCrowdedCell) != 0) owner.crowded.erase(index);
        cell.flags = remote ? uint32_t{kRemoteTouched} : 0;
        cell.slots[0] = {now.who, now.clock, mask, now.what};
        cell.slots[1].mask = cell.slots[2].mask = 0;
        return;
      }
    }
    check_race(cell, index, mask);
  }

  void check_race(SharedCell& cell, uint32_t index, uint32_t mask) {
    if (remote) cell.flags |= kRemoteTouched;
    now.mask = mask;
    const auto knows = [&](uint32_t who, uint32_t clock) { return me.clock.knows_near(who, clock); };
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

bool bytes_set(const CtaState& owner, uint64_t offset, uint32_t bytes, uint32_t SharedCell::*field) {
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

void Checker::State::report_shared_bounds(Warp& warp, const Instr& instr, const Access& access, LaneMask bad,
                                          const Cta* cta) {
  std::string text = std::string(verb(access.kind)) + " " + std::to_string(access.bytes) +
                     " bytes at shared address " + hex(access.address[std::countr_zero(bad)]);
  if (cta == nullptr) {
    text += ", whose rank the cluster does not have";
  } else if (cta->check == nullptr) {
    text += " of a CTA that has ended";
  } else {
    text += ", outside the CTA's " + hex(kSharedStart) + " to " + hex(cta->shared_bytes);
  }
  report(warp, instr, bad, FindingKind::kOutOfBounds, text);
}

LaneMask Checker::State::access_shared(Warp& warp, const Instr& instr, const Access& access,
                                       LaneMask stored, LaneMask* valid, bool async) {
  LaneMask left = aligned_lanes(warp, instr, access);
  LaneMask carried = 0;
  LaneMask initialised = kFullMask;
  WarpState& me = state_of(warp);
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
    if (ranks != 0) {
      group = lanes_where(access.address, left,
                          [&](uint64_t address) { return address >> kSharedRankShift == rank; });
    }
    left &= ~group;
    Cta* cta = rank == 0 ? &mine : owner_of(mine, rank << kSharedRankShift);
    LaneMask inside = 0;
    if (cta != nullptr && cta->check != nullptr && cta->shared_bytes >= access.bytes) {
      inside = lanes_within(offsets, group, kSharedStart, cta->shared_bytes - access.bytes);
    }
    if (inside != group) {
      report_shared_bounds(warp, instr, access, group & ~inside, cta);
      if (inside == 0) continue;
    }
    carried |= inside;
    CtaState& owner = state_of(*cta);
    const Mode mode = async ? Mode::kBeginAsync : access.kind == AccessKind::kRead ? Mode::kRead : Mode::kWrite;
    SharedTouch touch{*this, access, me, owner, cta != &mine, mode,
                      {me.clock.self, me.clock.now, 0, instr.index << 2 | stamp_kind(access)}};
    touch.touch_runs(Runs(offsets, access.bytes, inside));
    if (touch.missing != 0 && access.kind != AccessKind::kWrite) {
      // An atomic has set the bits; what was missing is not known by lane any more, so all of it is.
      initialised &= ~inside;
      if (access.kind == AccessKind::kRead) {
        initialised |= lanes_where(offsets, inside, [&](uint64_t offset) {
          return bytes_set(owner, offset, access.bytes, &SharedCell::init);
        });
      }
    }
    if (access.kind != AccessKind::kRead && !async && (inside & ~stored) != 0) {
      for (LaneMask tainted = inside & ~stored; tainted != 0; tainted &= tainted - 1) {
        clear_init(owner, offsets[std::countr_zero(tainted)], access.bytes);
      }
    }
    if (touch.in_flight || touch.races) initialised |= inside;  // one finding is enough
    if (touch.in_flight && synccheck) {
      report(warp, instr, inside, FindingKind::kAsyncNotWaited,
             std::string(verb(access.kind)) +
                 " shared memory that an asynchronous copy under way will write: its group has not been "
                 "waited for");
    }
    if (touch.races && !touch.in_flight) {
      report_race(warp, instr, inside, access, touch.other, true, touch.race_cell);
    }
    if (racecheck && !access.relaxed && !async) check_lanes(warp, instr, access, inside);
  }
  if (initcheck && access.kind == AccessKind::kAtomic && (carried & ~initialised) != 0) {
    report(warp, instr, carried & ~initialised, FindingKind::kUninitialised,
           "atomic operation on uninitialised shared memory");
  }
  if (valid != nullptr) *valid = initcheck ? initialised | ~carried : kFullMask;

  Tally& tally = state_of(mine).tally;
  const uint64_t bytes = uint64_t{access.bytes} * std::popcount(carried);
  if (access.kind != AccessKind::kWrite) tally.shared_load_bytes += bytes;
  if (access.kind != AccessKind::kRead) tally.shared_store_bytes += bytes;
  const Wavefronts wavefronts = bank_wavefronts(access.address, access.bytes, carried);
  tally.wavefronts[instr.index].done += wavefronts.done;
  tally.wavefronts[instr.index].ideal += wavefronts.ideal;
  return carried;
}

void Checker::State::check_lanes(Warp& warp, const Instr& instr, const Access& access, LaneMask lanes) {
  LaneStores& stores = state_of(warp).lane_stores;
  if (instr.kind == InstrClass::kMatrixLoad) {
    stores.count = 0;  // .sync, and rows belong to no lane
    return;
  }
  if (access.kind == AccessKind::kWrite) {
    stores.add(instr, access, lanes);
    return;
  }
  LaneMask loaded = 0;
  const LaneStore* store = stores.find(access, lanes, &loaded);
  if (store == nullptr) return;
  report(warp, instr, loaded, FindingKind::kRace,
         "reads shared memory that another lane of the warp has written, without bar.warp.sync in between: " +
             launch.program->texts[store->instr] + " (" + source_of(*launch.program, store->instr) + ")");
}

void LaneStores::add(const Instr& instr, const Access& access, LaneMask lanes) {
  if (lanes == 0) return;
  if (count == entries.size()) {
    std::copy(entries.begin() + 1, entries.end(), entries.begin());
    --count;
  }
  LaneStore& entry = entries[count++];
  entry.instr = instr.index;
  entry.bytes = access.bytes;
  entry.lanes = lanes;
  std::copy(access.address, access.address + kLanes, entry.address.begin());
  entry.lowest = ~uint64_t{0};
  entry.highest = 0;
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const uint64_t address = access.address[std::countr_zero(left)];
    entry.lowest = std::min(entry.lowest, address);
    entry.highest = std::max(entry.highest, address);
  }
}

void LaneStores::synchronise(LaneMask lanes) {
  if (lanes == kFullMask) count = 0;
  for (uint32_t i = 0; i < count; ++i) entries[i].lanes &= ~lanes;
}

const LaneStore* LaneStores::find(const Access& access, LaneMask lanes, LaneMask* loaded) const {
  LaneMask open = lanes;
  for (uint32_t i = count; i-- > 0;) {
    const LaneStore& store = entries[i];
    for (LaneMask left = store.lanes == 0 ? 0 : open; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      const uint64_t at = access.address[lane];
      if (at + access.bytes <= store.lowest || at >= store.highest + store.bytes) continue;
      // Its own store, if there is one, is in order.
      if ((store.lanes >> lane & 1) != 0 && at >= store.address[lane] &&
          at + access.bytes <= store.address[lane] + store.bytes) {
        open &= ~(LaneMask{1} << lane);  // and comes behind all older ones
        continue;
      }
      for (LaneMask others = store.lanes & ~(LaneMask{1} << lane); others != 0; others &= others - 1) {
        const uint64_t written = store.address[std::countr_zero(others)];
        if (at < written + store.bytes && written < at + access.bytes) {
          *loaded |= LaneMask{1} << lane;
          break;
        }
      }
    }
    if (*loaded != 0) return &store;
  }
  return nullptr;
}

LaneMask Checker::begin_async(Warp& warp, const Instr& instr, const Access& access) {
  return state_->access_shared(warp, instr, access, kFullMask, nullptr, true);
}

void Checker::end_async(Warp& warp, const Instr& instr, const Access& access, LaneMask initialised) {
  WarpState& me = state_of(warp);
  LaneMask left = access.lanes;
  while (left != 0) {
    const uint64_t rank = access.address[std::countr_zero(left)] >> kSharedRankShift;
    const LaneMask group = lanes_where(access.address, left, [&](uint64_t address) {
      return address >> kSharedRankShift == rank;
    });
    left &= ~group;
    Cta* cta = owner_of(*warp.cta, rank << kSharedRankShift);
    CtaState& owner = state_of(*cta);
    SharedTouch touch{*state_, access, me, owner, cta != warp.cta, Mode::kEndAsync,
                      {me.clock.self, me.clock.now, 0, instr.index << 2 | kWriteStamp}};
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
