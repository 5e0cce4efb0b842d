// What the checker keeps of a launch, of a CTA and of a warp. Private to check/.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "simulator/check/checker.h"
#include "simulator/check/clocks.h"
#include "simulator/check/race.h"
#include "simulator/check/runs.h"

namespace fused_peft::sim {

// ---- global memory: shadow pages of the launch, made when first touched

constexpr uint64_t kPageBytes = 4096;

class SpinLock {
 public:
  void lock() {
    while (flag_.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag flag_;
};

struct alignas(64) GlobalCell {
  Stamp slots[4];
};

// Bytes [begin, end) of a page that a warp has read.
struct PageRead {
  uint32_t who = 0, clock = 0;
  uint16_t begin = 0, end = 0;
  uint32_t what = 0;  // as Stamp::what
};

struct GlobalPage {
  SpinLock lock;
  uint64_t loaded[kPageBytes / 64] =
      {};  // a bit a byte: touched by a load, by a store of the launch
  uint64_t stored[kPageBytes / 64] = {};
  // Pages that are only read need no cells: their reads are listed, and become stamps with the
  // first write. Of very many, a random part is kept.
  std::vector<PageRead> reads;
  uint32_t reads_seen = 0;
  std::unique_ptr<GlobalCell[]> cells;                       // kPageBytes / kCellBytes of them
  std::unordered_map<uint32_t, std::vector<Stamp>> crowded;  // by cell
};

struct BufferShadow {
  explicit BufferShadow(std::shared_ptr<Buffer> buffer);
  GlobalPage& page(uint64_t address);

  std::shared_ptr<Buffer> buffer;
  uint64_t first_page;  // start / kPageBytes
  std::unique_ptr<std::atomic<GlobalPage*>[]> pages;
  uint64_t num_pages;
  SpinLock lock;
  std::vector<std::unique_ptr<GlobalPage>> made;
};

// ---- shared memory of one CTA

struct alignas(64) SharedCell {
  uint32_t interval = 0;   // of the CTA when last touched: stamps of earlier ones happened before
  uint32_t init = 0;       // bytes that hold data
  uint32_t in_flight = 0;  // bytes that an asynchronous copy will write
  uint32_t flags = 0;
  Stamp slots[3];
};
static_assert(sizeof(SharedCell) == 64);
enum SharedCellFlags : uint32_t { kRemoteTouched = 1, kCrowdedCell = 2 };

struct Wavefronts {
  uint64_t done = 0, ideal = 0;
};

// Totals of one CTA, added to the launch's when it ends.
struct Tally {
  uint64_t global_load_bytes = 0, global_store_bytes = 0, global_atomic_bytes = 0;
  uint64_t global_load_sectors = 0, global_store_sectors = 0;
  uint64_t shared_load_bytes = 0, shared_store_bytes = 0;
  uint64_t local_load_bytes = 0, local_store_bytes = 0;
  uint64_t barriers = 0;
  std::vector<Wavefronts> wavefronts;  // by instruction

  void add(const Tally& other);
};

struct ClusterState {
  ClusterClocks clocks;
  std::vector<uint32_t>
      proxied;              // by warp: its clock up to which a proxy fence lies behind its writes
  uint32_t unfinished = 0;  // CTAs
};

struct CtaState {
  Cta* cta = nullptr;
  std::shared_ptr<ClusterState> cluster;
  uint32_t interval = 1;  // barriers of the whole CTA so far
  bool ended = false;     // its shared memory is another CTA's by now
  std::vector<SharedCell> cells;
  std::unordered_map<uint32_t, std::vector<Stamp>> crowded;  // by cell
  WordClocks words;                                          // of its shared memory
  Tally tally;
};

// Stores of a warp to shared memory that its lanes have not synchronised after.
struct LaneStore {
  uint32_t instr = 0;
  uint32_t bytes = 0;
  LaneMask lanes = 0;
  uint64_t lowest = 0, highest = 0;  // addresses of first bytes
  std::array<uint64_t, kLanes> address;
  std::array<LaneMask, kLanes> reached;  // lanes that come behind the store of each lane
};

// The last few of them. A load by another lane of what one of them stored is a race: since Volta
// lanes need not run in step, and only bar.warp.sync orders them. Any .sync instruction counts
// here.
struct LaneStores {
  std::array<LaneStore, 8> entries;
  uint32_t count = 0;

  void add(const Instr& instr, const Access& access, LaneMask lanes);
  void synchronise(LaneMask lanes);
  // The store whose data a lane loads that did not store it; nullptr if none. *loaded becomes those
  // lanes.
  const LaneStore* find(const Access& access, LaneMask lanes, LaneMask* loaded) const;
};

struct WarpState {
  WarpClock clock;
  uint64_t cta = 0;
  uint32_t global_who = 0;           // Stamp::who in global memory
  std::vector<uint64_t> local_init;  // a bit a byte, lane after lane
  std::vector<uint64_t> private_init;
  BufferShadow* last_buffer = nullptr;
  LaneStores lane_stores;
};

struct SharedTouch;
struct GlobalTouch;

struct Checker::State {
  explicit State(Launch& launch);

  Launch& launch;
  const bool memcheck, initcheck, racecheck, synccheck;

  // Buffers touched so far. Sorted by start in a copy-on-write list, so that look-ups need no lock.
  using ShadowList = std::vector<BufferShadow*>;
  std::mutex shadows_mutex;
  std::atomic<const ShadowList*> shadow_list{nullptr};
  std::vector<std::unique_ptr<const ShadowList>> shadow_lists;
  std::vector<std::unique_ptr<BufferShadow>> shadows;
  std::unique_ptr<std::atomic<BufferShadow*>[]>
      used_by;  // by instruction: the buffer of its last access

  std::mutex words_mutex;
  WordClocks words;  // of global memory
  std::atomic<bool> words_used{false};

  std::mutex mutex;  // of all below
  std::vector<Finding> findings;
  std::map<std::pair<uint32_t, FindingKind>, size_t> finding_index;
  uint64_t total_findings = 0;
  Tally tally;
  uint64_t next_cluster = 1;

  BufferShadow* shadow_of(uint64_t address, uint64_t bytes);

  LaneMask access_global(Warp& warp, const Instr& instr, const Access& access, LaneMask stored,
                         LaneMask* valid);
  LaneMask access_elsewhere(Warp& warp, const Instr& instr, const Access& access, LaneMask left,
                            LaneMask* carried);
  LaneMask access_buffer(BufferShadow& shadow, const Runs& runs, const Access& access,
                         LaneMask lanes, GlobalTouch& touch);
  LaneMask access_const(Warp& warp, const Instr& instr, const Access& access, LaneMask* valid);
  LaneMask access_shared(Warp& warp, const Instr& instr, const Access& access, LaneMask stored,
                         LaneMask* valid, bool async);
  LaneMask access_cta(Warp& warp, const Instr& instr, const Access& access, Cta& cta,
                      const uint64_t* offsets, LaneMask lanes, LaneMask stored, bool async);
  void count_shared(Warp& warp, const Instr& instr, const Access& access, LaneMask lanes);
  void report_touch(Warp& warp, const Instr& instr, LaneMask lanes, const SharedTouch& touch);
  LaneMask access_private(Warp& warp, const Instr& instr, const Access& access, LaneMask stored,
                          LaneMask* valid);
  // Whether the bytes lie in the kernel's own parameters, whose generic address cvta.param gives.
  bool in_params(uint64_t address, uint32_t bytes) const;
  // Lanes whose address is a multiple of the access's bytes.
  LaneMask aligned_lanes(Warp& warp, const Instr& instr, const Access& access);
  void report_shared_bounds(Warp& warp, const Instr& instr, const Access& access, LaneMask bad,
                            const Cta* cta);
  // An access of another CTA to the shared memory of one that ended without waiting for it.
  void report_unawaited(const Cta& cta, uint64_t cell, const Stamp& stamp);
  // Data exchanged between the lanes of a warp.
  void check_lanes(Warp& warp, const Instr& instr, const Access& access, LaneMask lanes);
  void report(const Warp& warp, const Instr& instr, LaneMask lanes, FindingKind kind,
              const std::string& detail);
  void report_race(const Warp& warp, const Instr& instr, LaneMask lanes, const Access& access,
                   const Stamp& other, bool shared, uint64_t cell);
};

inline WarpState& state_of(const Warp& warp) { return *static_cast<WarpState*>(warp.check); }
inline CtaState& state_of(const Cta& cta) { return *static_cast<CtaState*>(cta.check); }

inline StampKind stamp_kind(const Access& access) {
  if (access.kind == AccessKind::kAtomic) return StampKind(kWriteStamp | kRelaxedStamp);
  const uint32_t write = access.kind == AccessKind::kWrite ? kWriteStamp : kReadStamp;
  return StampKind(write | (access.relaxed ? kRelaxedStamp : 0u));
}

const char* verb(AccessKind kind);  // "read of"
std::string hex(uint64_t value);
std::string source_of(const Program& program, uint32_t instr);  // "k.cu:12", "ptx:34"

// Wavefronts of an access to shared memory by the usual bank model, and how few they could be.
Wavefronts bank_wavefronts(const uint64_t* address, uint32_t bytes, LaneMask lanes);
// Distinct 32-byte sectors of the ranges.
uint32_t count_sectors(const Runs& runs);

}  // namespace fused_peft::sim
