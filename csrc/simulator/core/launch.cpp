// Runs the CTAs of a launch, on as many threads as its options say.
#include <algorithm>
#include <exception>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "simulator/check/memory_map.h"
#include "simulator/core/cta.h"
#include "simulator/exec/scheduler.h"

namespace fused_peft::sim {
namespace {

uint32_t resident_clusters(const Launch& launch, uint64_t num_clusters, uint32_t workers) {
  uint64_t sms = uint64_t(launch.device->num_sms);
  if (launch.options.max_sms != 0) sms = std::min<uint64_t>(sms, launch.options.max_sms);
  const uint64_t blocks =
      sms * uint64_t(std::max(1, blocks_per_sm(*launch.program, launch.config.block.count(),
                                               launch.config.dynamic_shared, *launch.device)));
  uint64_t resident = std::max<uint64_t>(1, blocks / launch.config.cluster.count());
  if (launch.config.cooperative) resident = std::max(resident, num_clusters);
  resident = std::min(resident, num_clusters);
  return uint32_t((resident + workers - 1) / workers);
}

void add_counts(Launch& launch, const Worker& worker) {
  for (size_t i = 0; i < launch.executed.size(); ++i) {
    launch.executed[i] += worker.counts()[i].warps;
    launch.executed_lanes[i] += worker.counts()[i].lanes;
  }
  launch.barriers_passed += worker.barriers_passed();
}

// Kernels may touch the launch's grid workspace while this lives.
class GridWorkspace {
 public:
  explicit GridWorkspace(Launch& launch)
      : memory_(launch.config.cooperative ? &launch.grid_workspace : nullptr) {
    if (!memory_) return;
    *memory_ = {sizeof *memory_, 0};
    MemoryMap::global().add(memory_->data(), sizeof *memory_, /*initialised=*/true,
                            "grid workspace");
  }
  ~GridWorkspace() {
    if (memory_) MemoryMap::global().remove(memory_->data());
  }
  GridWorkspace(const GridWorkspace&) = delete;
  GridWorkspace& operator=(const GridWorkspace&) = delete;

 private:
  std::array<uint32_t, 2>* memory_;
};

void run_workers(Launch& launch, LaunchQueue& queue,
                 std::vector<std::unique_ptr<Worker>>& workers) {
  std::vector<std::exception_ptr> errors(workers.size());
  const auto work = [&](size_t i) {
    try {
      workers[i]->run();
    } catch (...) {
      errors[i] = std::current_exception();
      queue.failed.store(true, std::memory_order_relaxed);
    }
  };
  {
    std::vector<std::jthread> threads;
    for (size_t i = 1; i < workers.size(); ++i) threads.emplace_back(work, i);
    work(0);
  }
  for (const auto& worker : workers) add_counts(launch, *worker);
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace

void run_launch(Launch& launch) {
  const Program& program = *launch.program;
  const LaunchConfig& config = launch.config;
  LaunchQueue queue;
  queue.num_clusters = config.grid.count() / config.cluster.count();
  const uint32_t num_workers = uint32_t(
      std::clamp<uint64_t>(launch.options.threads, 1, std::max<uint64_t>(1, queue.num_clusters)));
  queue.max_resident = resident_clusters(launch, queue.num_clusters, num_workers);
  std::optional<ValidityPlan> plan;
  if (launch.options.initcheck) plan.emplace(program);
  launch.executed.assign(program.code.size(), 0);
  launch.executed_lanes.assign(program.code.size(), 0);
  std::vector<std::unique_ptr<Worker>> workers;
  for (uint32_t i = 0; i < num_workers; ++i) {
    workers.push_back(std::make_unique<Worker>(launch, queue, plan ? &*plan : nullptr, i));
  }
  const GridWorkspace workspace(launch);
  run_workers(launch, queue, workers);
}

}  // namespace fused_peft::sim
