// mbarrier objects, and the bulk copies that complete on them (PTX ISA 9.7.13.15).
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "simulator/check/checker.h"
#include "simulator/core/cta.h"
#include "simulator/exec/bulk_reduce.h"

namespace fused_peft::sim {

// 16 bytes of a bulk copy, or what a lane stores by st.async. Bytes [begin, end) lie in global
// memory (or in another CTA's shared memory), from `host` + begin on; the others are outside of a
// tensor.
struct CopyUnit {
  uint64_t shared = 0;        // address in the shared memory of its CTA: offset
  std::byte* host = nullptr;  // of byte 0
  uint8_t begin = 0, end = 16;
  bool initialised = true;  // the source's bytes
  bool skip = false;        // out of bounds: reported, not carried out
};
constexpr uint32_t kUnitBytes = 16;
constexpr uint32_t kMaxArrivals = (1u << 20) - 1;  // of a phase

// A copy, store or reduction into the shared memory of one CTA, from its issue until a thread has
// seen its mbarrier's phase complete.
struct BulkLoad {
  Warp* issuer = nullptr;
  const Instr* instr = nullptr;
  Cta* target = nullptr;
  std::vector<CopyUnit> units;
  uint32_t unit_bytes = kUnitBytes;
  std::byte values[kUnitBytes] = {};  // of st.async and red.async
  Combine combine = nullptr;          // red.async: an operation on what is there
  std::byte fill[kUnitBytes] = {};    // what lies outside of a tensor reads as
  uint64_t bytes = 0;                 // for complete_tx

  void move() const;
};

// What lies behind the 8 bytes of an mbarrier. They themselves hold encode(), so that a store that
// hits them is seen.
struct Mbarrier {
  uint32_t expected = 0;     // arrivals of a phase
  uint32_t pending = 0;      // of this phase
  int64_t transactions = 0;  // bytes expected and not arrived yet
  uint64_t phase = 0;        // completed ones
  SyncVar arriving,
      completed;  // what those knew that arrived in this phase, in the last completed one
  std::vector<std::unique_ptr<BulkLoad>> in_flight;   // data not moved yet
  std::vector<std::unique_ptr<BulkLoad>> landed;      // in this phase
  std::vector<std::unique_ptr<BulkLoad>> unobserved;  // in completed ones; nobody has waited

  uint64_t encode() const;
};

// The place of an mbarrier: the CTA that owns it and its offset there.
struct MbarrierPlace {
  Cta* cta = nullptr;
  uint32_t offset = 0;
  uint64_t address = 0;  // as the instruction has it, window taken off
};

// The mbarriers of a CTA (Cta::mbarriers), by offset in its shared memory.
struct MbarrierTable : std::unordered_map<uint32_t, Mbarrier> {
  ~MbarrierTable() {
    for (auto& [offset, barrier] : *this) {
      Checker::drop(barrier.arriving);
      Checker::drop(barrier.completed);
    }
  }
};

MbarrierTable& table_of(Cta& cta);

// False where the address is none of shared memory (reported).
bool place_of(Warp& warp, const Instr& instr, uint64_t address, bool generic, int lane,
              MbarrierPlace* place);
// The mbarrier's bytes as memory: bounds, alignment, races. Init and inval (kWrite) are plain
// writes, which must be ordered before whatever else touches the object; all other operations are
// atomic. False where they must not be carried out (reported).
bool touch_mbarrier(Warp& warp, const Instr& instr, const MbarrierPlace& place, int lane,
                    AccessKind kind);
// nullptr where no mbarrier.init has made one there (reported).
Mbarrier* find_mbarrier(Warp& warp, const Instr& instr, const MbarrierPlace& place, int lane);

// Writes the mbarrier's bytes; settle() first begins a new phase where nothing more is expected of
// this one.
void write_word(const Mbarrier& barrier, const MbarrierPlace& place);
void settle(Mbarrier& barrier, const MbarrierPlace& place);

// A thread has seen that a phase is complete: the bytes of its copies are in flight no more.
void observe(Mbarrier& barrier, Checker& checker);
// Some of what is in flight lands, now that a thread waits for it: all, or as the dice fall.
void land_some(Warp& warp, Mbarrier& barrier, const MbarrierPlace& place);
// The copy's data moves and its bytes count as arrived.
void land(Mbarrier& barrier, const MbarrierPlace& place, std::size_t which);
void complete_transactions(Mbarrier& barrier, const MbarrierPlace& place, int64_t bytes);

// Whether an asynchronous copy that is issued now moves its data at once, by Options::async_timing.
bool moves_early(Warp& warp);

// The address that any CTA of the cluster has for an offset in this one's shared memory.
uint64_t shared_address(const Cta& cta, uint64_t offset);

}  // namespace fused_peft::sim
