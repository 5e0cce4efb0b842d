// Every access to memory and every synchronisation of a launch passes here: bounds, initialisation,
// races, counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "simulator/check/counters.h"
#include "simulator/check/memory_map.h"
#include "simulator/core/cta.h"

namespace fused_peft::sim {

enum class FindingKind : uint8_t {
  kOutOfBounds,
  kMisaligned,
  kUninitialised,
  kRace,
  kDivergentBarrier,
  kBarrierCount,
  kAsyncNotWaited,
  kProxyFence,
  kLeak,
  kOther,
};
const char* name_of(FindingKind kind);

struct Finding {
  FindingKind kind;
  std::string kernel;
  Dim3 block, thread;       // of the first lane
  std::string instruction;  // its PTX text
  std::string source;       // "k.cu:12", or "ptx:34"
  std::string text;         // all of it, for people
  uint64_t count = 1;       // times, at the same instruction and of the same kind
};

enum class AccessKind : uint8_t { kRead, kWrite, kAtomic };

// An access of one warp to one state space: lane l touches `bytes` bytes at address[l].
struct Access {
  Space space;  // kGlobal, kShared, kLocal, kConst, kParam: generic has been resolved
  AccessKind kind;
  uint32_t bytes;  // of one lane, all elements of a vector access together
  LaneMask lanes;
  // Global, const: host addresses. Shared: as the ISA's 32-bit addresses (core/types.h). Local:
  // offset in the thread's own. Param: kCalleeParam + offset in the thread's private memory.
  const uint64_t* address;
  // .relaxed, .acquire, .release, .volatile and atomics: no data race with their like.
  bool relaxed = false;
  // What a write stores: lane l's bytes at data + l * bytes. Optional; two writes of the same value
  // to the same bytes are no race where it is known (compute-sanitizer's racecheck has them at
  // level INFO, off by default).
  const std::byte* data = nullptr;
  uint32_t align =
      0;  // that the address must be a multiple of; 0: bytes, which then is a power of two
  // Through the async proxy (bulk copies, wgmma): such a read of bytes that a generic write left is
  // a finding where no fence.proxy.async lies in between. Not counted as wavefronts.
  bool async_proxy = false;
};

// Who is meant to see what a fence orders (PTX ISA 8.5).
enum class Scope : uint8_t { kCta, kCluster, kDevice, kSystem };

// What one warp knows of the others (a vector clock). A SyncVar carries such knowledge from those
// that release into it to those that acquire from it: a named barrier, an mbarrier. Within one
// cluster.
struct SyncVar {
  void* clock = nullptr;  // the Checker's own
};

// Findings and counts of one launch. With several worker threads every method may be called by all
// of them, each for the warps of its own clusters.
class Checker {
 public:
  explicit Checker(Launch& launch);
  ~Checker();
  Checker(const Checker&) = delete;
  Checker& operator=(const Checker&) = delete;

  // ---- called by the scheduler
  // Before the first instruction of any warp of the CTA; its warps and its cluster's CTAs are
  // complete. Fresh shared memory is uninitialised.
  void start(Cta& cta);
  // Behind its last instruction: from here on the CTA's shared memory is not there for its cluster.
  void end(Cta& cta);
  void finish(Cta& cta);  // the same, but of a cluster when all its CTAs have ended

  // ---- called by memory instructions
  // Reports what is wrong and returns the lanes that may be carried out (bounds and alignment); the
  // others read as zero or do not write. Called before the data moves. For kRead and kAtomic *valid
  // becomes the lanes whose bytes were all initialised; for kWrite and kAtomic `stored` says for
  // which lanes the stored value was. A store of uninitialised data to global memory is a finding,
  // one to shared or local memory makes those bytes uninitialised, an atomic on uninitialised bytes
  // is a finding.
  LaneMask access(Warp& warp, const Instr& instr, const Access& access, LaneMask stored,
                  LaneMask* valid);
  // Bit b: byte b at the address is initialised. No finding, no count; bytes <= 32, in bounds.
  uint32_t initialised_bytes(Warp& warp, Space space, uint64_t address, uint32_t bytes);
  // Host memory of lane `lane` at an address that access() has let pass.
  static std::byte* resolve(Warp& warp, Space space, uint64_t address, int lane);

  // ---- copies that run beside the warp into shared memory: in flight from begin_async to
  // end_async. Any other touch of those bytes in between is kAsyncNotWaited. begin_async checks
  // like a write of the warp; end_async (at the wait that completes the copy) makes them a write of
  // `warp` at that moment.
  LaneMask begin_async(Warp& warp, const Instr& instr, const Access& access);
  void end_async(Warp& warp, const Instr& instr, const Access& access, LaneMask initialised);

  // ---- happens-before
  // The warp's knowledge goes into / is joined from the variable.
  void release(Warp& warp, SyncVar& variable);
  void acquire(Warp& warp, const SyncVar& variable);
  // A relaxed arrival: into the variable goes only what the warp's last fence covers.
  void release_fenced(Warp& warp, SyncVar& variable);
  static void drop(SyncVar& variable);
  // All of these warps have passed one barrier together (bar.sync, barrier.cluster).
  void rendezvous(std::span<Warp* const> warps);
  // These lanes of the warp exchange data in order from here on: every .sync instruction.
  void synchronised_lanes(Warp& warp, LaneMask lanes);
  void fence(Warp& warp, Scope scope);  // membar, fence.acq_rel / .sc
  // fence.proxy.async: what the warp knows of in shared memory can be read through the async proxy.
  void proxy_fence(Warp& warp);
  // Through a word of memory. `strong`: st.release, ld.acquire and their atomic forms. Otherwise
  // relaxed ones: they pass on what the last fence in front covers, and give what the next fence or
  // barrier behind makes known.
  void release_at(Warp& warp, Space space, uint64_t address, Scope scope, bool strong);
  void acquire_at(Warp& warp, Space space, uint64_t address, Scope scope, bool strong);

  // ---- findings and counts
  void report(const Warp& warp, const Instr& instr, LaneMask lanes, FindingKind kind,
              const std::string& detail);
  const std::vector<Finding>& findings() const;
  uint64_t total_findings() const;
  Counters counters() const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace fused_peft::sim
