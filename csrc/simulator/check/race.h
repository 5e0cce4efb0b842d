// Who touched 32 bytes of memory last, and whether that happened before the present access.
//
// A cell keeps stamps of recent accesses, each with the mask of its bytes, so neighbours that use
// different bytes of one cell do not disturb each other. An access that comes after another in the
// order of happens-before and covers its bytes takes its stamp's place: whatever races with the old
// one races with the new one too (FastTrack, Flanagan and Freund 2009). Concurrent readers of the
// same bytes beyond the room for them replace one another at random (as in ThreadSanitizer), so a
// race with one of many may be missed, and none is ever made up.
#pragma once

#include <cstdint>
#include <vector>

namespace fused_peft::sim {

constexpr uint32_t kCellBytes = 32;

// An asynchronous copy's write is marked: it needs no proxy fence.
enum StampKind : uint32_t { kReadStamp = 0, kWriteStamp = 1, kRelaxedStamp = 2, kAsyncStamp = 4 };
constexpr uint32_t kStampKindBits = 3;

struct Stamp {
  uint32_t who = 0;    // the warp: in its cluster for shared memory, cta << 5 | warp for global
  uint32_t clock = 0;  // of that warp
  uint32_t mask = 0;   // bytes of the cell; 0: no stamp
  uint32_t what = 0;   // instruction index << kStampKindBits | StampKind

  uint32_t kind() const { return what & ((1u << kStampKindBits) - 1); }
  uint32_t instr() const { return what >> kStampKindBits; }
};

constexpr uint32_t stamp_what(uint32_t instr, uint32_t kind) {
  return instr << kStampKindBits | kind;
}

// Two accesses race if one writes and not both are relaxed.
constexpr bool conflict(uint32_t a, uint32_t b) {
  return ((a | b) & kWriteStamp) != 0 && ((a & b) & kRelaxedStamp) == 0;
}
// Whatever conflicts with `old` conflicts with `now`.
constexpr bool covers(uint32_t now, uint32_t old) {
  return (now & kWriteStamp) >= (old & kWriteStamp) &&
         (now & kRelaxedStamp) <= (old & kRelaxedStamp);
}

// Field by field: a copy of all 16 bytes would wait for those that have just been written.
inline void set(Stamp& to, const Stamp& from) {
  to.who = from.who;
  to.clock = from.clock;
  to.mask = from.mask;
  to.what = from.what;
}

// Puts a read over another one of the same bytes, chosen at random. False: there are not two such
// slots.
bool replace_reader(Stamp* slots, int count, const Stamp& now);
// Adds to a crowded cell's list.
void add_stamp(std::vector<Stamp>& more, const Stamp& now);

// Checks one earlier stamp. True: it races. Takes away its bytes that `now` stands for.
template <class Knows>
inline bool meet(Stamp& old, const Stamp& now, const Knows& knows) {
  const uint32_t overlap = old.mask & now.mask;
  if (overlap == 0) return false;
  const bool ordered = old.who == now.who || knows(old.who, old.clock);
  if (!ordered) return conflict(old.kind(), now.kind());
  if (covers(now.kind(), old.kind())) old.mask &= ~now.mask;
  return false;
}

// Records `now` in a cell. Returns true and the other stamp where it races. has_more: the cell's
// list `more()` is in use.
template <int kSlots, class Knows, class More>
inline bool touch(Stamp (&slots)[kSlots], bool has_more, const Stamp& now, const Knows& knows,
                  const More& more, Stamp* other) {
  Stamp& first = slots[0];
  const auto same = [&](const Stamp& stamp) {
    return stamp.who == now.who && stamp.clock == now.clock && stamp.kind() == now.kind();
  };
  // Recorded before: whoever came since has been checked against it.
  if (same(first) && (now.mask & ~first.mask) == 0) return false;
  bool races = false;
  bool recorded = false;
  int free = -1;
  for (int i = 0; i < kSlots; ++i) {
    Stamp& slot = slots[i];
    if (slot.mask != 0) {
      if (same(slot)) {
        slot.mask |= now.mask;
        recorded = true;
        continue;
      }
      if (meet(slot, now, knows)) {
        races = true;
        *other = slot;
      }
    }
    if (slot.mask == 0 && free < 0) free = i;
  }
  if (has_more) {
    for (Stamp& slot : more()) {
      if (same(slot)) {
        slot.mask |= now.mask;
        recorded = true;
      } else if (meet(slot, now, knows)) {
        races = true;
        *other = slot;
      }
    }
  }
  if (recorded) return races;
  if (free >= 0) {
    set(slots[free], now);
  } else if (!replace_reader(slots, kSlots, now)) {
    add_stamp(more(), now);
  }
  return races;
}

}  // namespace fused_peft::sim
