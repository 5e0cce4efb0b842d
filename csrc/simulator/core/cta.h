// A CTA while it is resident, its cluster, and the launch they belong to.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "simulator/core/device.h"
#include "simulator/core/options.h"
#include "simulator/core/warp.h"

namespace fused_peft::sim {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

class Checker;  // check/checker.h
class Launch;
struct Cluster;

// One of the 16 barriers of a CTA. A warp arrives, with 32 threads, once all its lanes alive have
// (PTX ISA 9.7.13.1); `lanes` are those of warps that have not arrived yet.
struct NamedBarrier {
  uint32_t expected = 0;           // threads, rounded up to warps; 0 while nobody has arrived
  bool everyone = false;           // no count was given: warps that have exited need not arrive
  uint32_t arrived = 0;            // threads
  uint64_t generation = 0;         // counts completions
  std::vector<LaneMask> lanes;     // by warp
  std::vector<char> has_arrived;   // by warp, in this generation
  uint32_t votes = 0, voters = 0;  // of bar.red: predicates that were true, and all
  bool votes_valid = true;         // computed from initialised data
  uint32_t last_votes = 0, last_voters = 0;  // of the last completion
  bool last_votes_valid = true;
  void* clock = nullptr;  // of a SyncVar: what those knew that arrived without waiting
};

class Cta {
 public:
  Launch* launch = nullptr;
  Cluster* cluster =
      nullptr;        // never null while it runs; of this CTA alone where the launch has none
  uint32_t rank = 0;  // in the cluster
  Dim3 index;         // %ctaid
  uint64_t linear = 0;
  uint32_t sm = 0;  // %smid
  std::vector<Warp> warps;
  std::byte* shared = nullptr;  // offset 0; the first kSharedStart bytes are not to be touched
  uint32_t shared_bytes = 0;    // kSharedStart + static + dynamic
  NamedBarrier barriers[16];
  uint32_t num_threads = 0;
  uint32_t live_warps = 0;          // with lanes that have not exited
  std::vector<Warp*> ready;         // those that can be run
  uint64_t barriers_passed = 0;     // completions of bar / barrier
  int64_t free_registers = 0;       // of setmaxnreg's pool
  uint64_t* progress = nullptr;     // of the worker that runs this CTA
  uint64_t* clock = nullptr;        // the same; %clock64
  std::shared_ptr<void> mbarriers;  // exec/mbarrier.h: the mbarrier objects in its shared memory
  void* check = nullptr;            // the sanitizers' own state of this CTA

  // Something that another warp may wait for has happened: memory that others see has changed, a
  // barrier was passed, a warp has exited. (An atomic that leaves memory as it was is no progress:
  // spin locks.)
  void progressed() { ++*progress; }
  // A split of this warp has stopped waiting.
  void wake(Warp& warp) {
    warp.stuck = false;
    if (warp.is_ready) return;
    warp.is_ready = true;
    ready.push_back(&warp);
  }
};

struct Cluster {
  std::vector<Cta*> ctas;  // by rank; all stay until the last has finished
  uint32_t live_threads = 0;
  uint32_t arrived = 0;     // of barrier.cluster, threads
  uint64_t generation = 0;  // its completions
  void* clocks[2] = {};     // of SyncVars, by the generation's parity
  void* check = nullptr;
};

// What a launch asks for.
struct LaunchConfig {
  Dim3 grid, block, cluster;  // cluster 1,1,1: none
  uint32_t dynamic_shared = 0;
  bool cooperative = false;
  AlignedBytes params;  // laid out as Program::params says
};

// A launch under way. Everything a handler may reach hangs from here: warp.cta->launch.
class Launch {
 public:
  const Program* program = nullptr;
  LaunchConfig config;
  const DeviceModel* device = nullptr;
  Options options;
  uint64_t number = 0;                   // of the process's launches
  std::vector<uint64_t> executed;        // by instruction: warp instructions with at least one lane
  std::vector<uint64_t> executed_lanes;  // by instruction: thread instructions
  Checker* checker = nullptr;    // never null during execution; memory accesses go through it
  std::mutex mutex;              // of output
  std::string output;            // of printf, flushed to stdout at the end
  uint64_t barriers_passed = 0;  // by CTAs
  // Of a cooperative launch, what cooperative groups' grid barrier works on: its size and its
  // state.
  std::array<uint32_t, 2> grid_workspace{};
};

// Runs every CTA of the launch to its end. Throws LaunchFailure or Unsupported, with kernel, block,
// thread and source line in the text.
void run_launch(Launch& launch);

// The cudaError_t with which this launch would fail on the device; 0: none. *why says what is too
// large.
int validate_launch(const Program& program, const LaunchConfig& config, const DeviceModel& device,
                    std::string* why);
// CTAs of the kernel that fit on one SM at a time; clusters that fit on the device.
int blocks_per_sm(const Program& program, uint64_t block_threads, uint32_t dynamic_shared,
                  const DeviceModel& device);
int max_active_clusters(const Program& program, const LaunchConfig& config,
                        const DeviceModel& device);
// Registers of a thread: .maxnreg, or what launch bounds leave to it (ptxas is not run).
uint32_t registers_per_thread(const Program& program);

// "kernel f, block (1,0,0), warp 2, lanes 0-3: ld.global.f32 ... (k.cu:12)" for messages.
std::string describe(const Warp& warp, const Instr& instr, LaneMask lanes);
std::string describe_instruction(const Program& program, const Instr& instr);
std::string describe_lanes(LaneMask lanes);  // "0-3,7"

}  // namespace fused_peft::sim
