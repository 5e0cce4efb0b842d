// Data that lanes of one warp exchange through shared memory.
#include <algorithm>
#include <bit>

#include "simulator/check/state.h"

namespace fused_peft::sim {

void Checker::State::check_lanes(Warp& warp, const Instr& instr, const Access& access,
                                 LaneMask lanes) {
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
         "reads shared memory that another lane of the warp has written, without bar.warp.sync in "
         "between: " +
             launch.program->texts[store->instr] + " (" + source_of(*launch.program, store->instr) +
             ")");
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
  for (int lane = 0; lane < kLanes; ++lane) entry.reached[lane] = LaneMask{1} << lane;
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
  for (uint32_t i = 0; i < count; ++i) {
    for (LaneMask& reached : entries[i].reached) {
      if ((reached & lanes) != 0) reached |= lanes;
    }
  }
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
      for (LaneMask others = store.lanes & ~(LaneMask{1} << lane); others != 0;
           others &= others - 1) {
        const uint64_t written = store.address[std::countr_zero(others)];
        const bool ordered = (store.reached[std::countr_zero(others)] >> lane & 1) != 0;
        if (!ordered && at < written + store.bytes && written < at + access.bytes) {
          *loaded |= LaneMask{1} << lane;
          break;
        }
      }
    }
    if (*loaded != 0) return &store;
  }
  return nullptr;
}

}  // namespace fused_peft::sim
