// Who runs when: CTAs become resident as the device has room, and take turns in slices of random
// length.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "simulator/core/cta.h"
#include "simulator/core/random.h"
#include "simulator/exec/run_warp.h"
#include "simulator/exec/special.h"

namespace fused_peft::sim {

struct FreeDeleter {
  void operator()(std::byte* memory) const;
};

// Where the memory of a CTA's threads lies, from its start on.
struct CtaLayout {
  size_t frames = 0, frame_bytes = 0;  // of a warp; likewise below
  size_t valid = 0, valid_bytes = 0;
  size_t local = 0, local_bytes = 0;
  size_t private_memory = 0, private_bytes = 0;
  size_t total = 0;
  uint32_t shared_bytes = 0;
  uint32_t num_warps = 0;

  explicit CtaLayout(const Launch& launch);
};

// A CTA and the memory of its threads; reused for one CTA after another.
struct CtaSlot {
  Cta cta;
  std::unique_ptr<std::byte, FreeDeleter>
      memory;          // shared, frames, validity, local and private memory
  uint32_t speed = 0;  // log2 of its longest slices
};

// CTAs that start and end together: a cluster, or one CTA.
struct ClusterSlot {
  Cluster cluster;
  std::vector<std::unique_ptr<CtaSlot>> slots;
};

// What the workers of a launch share.
struct LaunchQueue {
  std::atomic<uint64_t> next_cluster{0};
  uint64_t num_clusters = 0;
  uint32_t max_resident = 0;  // clusters of one worker at a time
  std::atomic<uint64_t> progress{0};
  std::atomic<bool> failed{false};
};

// Runs clusters from the queue until there are none.
class Worker {
 public:
  Worker(Launch& launch, LaunchQueue& queue, const ValidityPlan* plan, uint32_t number);
  // A launch that fails leaves clusters that have not ended.
  ~Worker();

  void run();
  const std::vector<InstrCount>& counts() const { return counts_; }
  uint64_t barriers_passed() const { return barriers_passed_; }

 private:
  void start_cluster(uint64_t number);
  void finish_cluster(size_t i);
  void start_cta(CtaSlot& slot, Cluster& cluster, Dim3 index, uint32_t rank);
  void start_warp(Warp& warp, CtaSlot& slot, std::byte* memory, uint32_t index);
  void admit();
  bool grow();
  void end_warp(Cta& cta);
  // Instructions executed in this CTA's turn.
  uint64_t run_turn(CtaSlot& slot);
  CtaSlot* choose_cta();
  bool poll_all();
  bool free_stuck_warps();
  bool all_yield() const;
  void check_hang(uint64_t executed);
  void resolve_standstill();

  Launch& launch_;
  LaunchQueue& queue_;
  const CtaLayout layout_;
  const ValidityPlan* plan_;
  const std::vector<const SpecialRegister*> specials_;
  Random random_;
  std::vector<InstrCount> counts_;
  std::vector<std::unique_ptr<ClusterSlot>> running_, unused_;
  uint32_t window_ = 0;  // clusters that are started as long as these make progress
  uint64_t started_ = 0;
  uint64_t progress_ = 0;  // bumped by this worker's handlers
  uint64_t seen_progress_ = 0;
  uint64_t shared_progress_ = 0;   // of all workers, as last seen
  uint64_t without_progress_ = 0;  // instructions
  uint64_t yields_ = 0;            // failed waits without progress
  uint64_t clock_ = 0;
  uint64_t barriers_passed_ = 0;
};

// A deadlock's report: which lanes wait for what, of the CTAs that are resident.
std::string describe_waiting(const std::vector<std::unique_ptr<ClusterSlot>>& running);

}  // namespace fused_peft::sim
