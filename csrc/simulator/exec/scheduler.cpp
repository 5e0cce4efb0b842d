#include "simulator/exec/scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "simulator/check/checker.h"
#include "simulator/core/errors.h"

namespace fused_peft::sim {
namespace {

constexpr int kErrorLaunchTimeout = 702;

// Slices of a warp and turns of a CTA are up to twice these, as powers of two; slow CTAs get
// shorter ones.
constexpr uint32_t kWarpSlice = 8;
constexpr uint32_t kCtaTurn = 14;
constexpr uint32_t kSlowdown = 4;
// A CTA's turn ends early when it makes no progress for so long.
constexpr uint64_t kFruitless = 1024;
// Lanes that are behind keep the others of their warp waiting for so many instructions at most.
constexpr uint32_t kDivergencePatience = 4096;
// CTAs are started a few at a time, which keeps their registers in the cache; after so many
// instructions without progress more are, as far as the device has room, since what these wait for
// may be theirs to do.
constexpr size_t kWindowBytes = size_t{3} << 20;
constexpr uint32_t kMinWindow = 4, kMaxWindow = 64;
constexpr uint64_t kGrowAfter = 200'000;
// So many failed waits (mbarrier.try_wait, nanosleep) without progress, when every warp that can
// run is in such a loop, are a hang too, long before the budget of instructions is spent.
constexpr uint64_t kFruitlessYields = 1 << 18;

// Registers and shared memory start with what was there before, on the first use with this: values
// that are no NaN and far from 0.
constexpr int kUninitialisedByte = 0xa5;

size_t aligned(size_t bytes, size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

Dim3 index_of(uint64_t linear, const Dim3& extent) {
  return {uint32_t(linear % extent.x), uint32_t(linear / extent.x % extent.y),
          uint32_t(linear / extent.x / extent.y)};
}

bool has_wait(const Warp& warp, Wait wait) {
  if (warp.current.mask != 0 && warp.current.wait == wait) return true;
  return std::ranges::any_of(warp.others, [wait](const Split& s) { return s.wait == wait; });
}

void remove_ready(Cta& cta, size_t i) {
  cta.ready[i]->is_ready = false;
  cta.ready[i] = cta.ready.back();
  cta.ready.pop_back();
}

// Registers of a thread when the CTA starts, the pool that setmaxnreg shares out.
uint32_t starting_registers(const Launch& launch) {
  if (const uint32_t registers = registers_per_thread(*launch.program)) return registers;
  const uint64_t threads = aligned(launch.config.block.count(), kLanes);
  return uint32_t(std::min<uint64_t>(255, uint64_t(launch.device->registers_per_sm) / threads)) /
         8 * 8;
}

}  // namespace

void FreeDeleter::operator()(std::byte* memory) const { std::free(memory); }

CtaLayout::CtaLayout(const Launch& launch) {
  const Program& program = *launch.program;
  num_warps = uint32_t((launch.config.block.count() + kLanes - 1) / kLanes);
  const uint32_t dynamic_start =
      std::max(program.dynamic_shared_offset, kSharedStart + program.static_shared_bytes);
  shared_bytes = dynamic_start + launch.config.dynamic_shared;
  frame_bytes = aligned(program.frame_bytes, 64);
  valid_bytes = aligned(program.num_registers * sizeof(LaneMask), 64);
  local_bytes = aligned(size_t(program.local_bytes) * kLanes, 64);
  private_bytes = aligned(size_t(program.private_bytes) * kLanes, 64);
  frames = aligned(shared_bytes, 64);
  valid = frames + num_warps * frame_bytes;
  local = valid + num_warps * valid_bytes;
  private_memory = local + num_warps * local_bytes;
  total = private_memory + num_warps * private_bytes;
}

Worker::Worker(Launch& launch, LaunchQueue& queue, const ValidityPlan* plan, uint32_t number)
    : launch_(launch),
      queue_(queue),
      layout_(launch),
      plan_(plan),
      specials_(resolve_specials(*launch.program)),
      random_(launch.options.seed * 0x2545f4914f6cdd1du + number),
      counts_(launch.program->code.size()) {
  const size_t cluster_bytes = layout_.total * launch.config.cluster.count();
  window_ = uint32_t(std::clamp<size_t>(kWindowBytes / std::max<size_t>(cluster_bytes, 1),
                                        kMinWindow, kMaxWindow));
  if (launch.config.cooperative) window_ = queue.max_resident;
  window_ = std::clamp(window_, 1u, queue.max_resident);
}

void Worker::start_warp(Warp& warp, CtaSlot& slot, std::byte* memory, uint32_t index) {
  const Program& program = *launch_.program;
  Cta& cta = slot.cta;
  warp.program = &program;
  warp.cta = &cta;
  warp.index = index;
  warp.uid = cta.linear * layout_.num_warps + index;
  const uint32_t threads = cta.num_threads - index * kLanes;
  warp.existing = threads >= kLanes ? kFullMask : (LaneMask{1} << threads) - 1;
  warp.bases = {memory + layout_.frames + index * layout_.frame_bytes,
                const_cast<std::byte*>(program.constants.data())};
  if (plan_) {
    std::byte* const valid = memory + layout_.valid + index * layout_.valid_bytes;
    std::memset(valid, 0, layout_.valid_bytes);
    warp.valid = reinterpret_cast<LaneMask*>(valid);
  }
  warp.local = memory + layout_.local + index * layout_.local_bytes;
  warp.private_memory = memory + layout_.private_memory + index * layout_.private_bytes;
  warp.current = {.pc = 0, .mask = warp.existing};
  warp.registers = starting_registers(launch_);
  fill_specials(warp, specials_);
  cta.wake(warp);
}

void Worker::start_cta(CtaSlot& slot, Cluster& cluster, Dim3 index, uint32_t rank) {
  if (!slot.memory) {
    slot.memory.reset(
        static_cast<std::byte*>(std::aligned_alloc(1024, aligned(layout_.total, 1024))));
    if (!slot.memory) throw std::bad_alloc();
    std::memset(slot.memory.get(), kUninitialisedByte, layout_.total);
  }
  const Dim3& grid = launch_.config.grid;
  Cta& cta = slot.cta;
  cta = Cta{};
  cta.launch = &launch_;
  cta.cluster = &cluster;
  cta.rank = rank;
  cta.index = index;
  cta.linear = index.x + uint64_t{grid.x} * (index.y + uint64_t{grid.y} * index.z);
  cta.sm = uint32_t(started_++ % uint64_t(launch_.device->num_sms));
  cta.shared = slot.memory.get();
  cta.shared_bytes = layout_.shared_bytes;
  cta.num_threads = uint32_t(launch_.config.block.count());
  cta.live_warps = layout_.num_warps;
  cta.progress = &progress_;
  cta.clock = &clock_;
  cta.warps.resize(layout_.num_warps);
  cta.ready.reserve(layout_.num_warps);
  for (uint32_t i = 0; i < layout_.num_warps; ++i) start_warp(cta.warps[i], slot, cta.shared, i);
  slot.speed = kCtaTurn - random_.below(kSlowdown + 1);
}

void Worker::start_cluster(uint64_t number) {
  const LaunchConfig& config = launch_.config;
  const Dim3& size = config.cluster;
  std::unique_ptr<ClusterSlot> slot;
  if (unused_.empty()) {
    slot = std::make_unique<ClusterSlot>();
    for (uint64_t i = 0; i < size.count(); ++i) slot->slots.push_back(std::make_unique<CtaSlot>());
  } else {
    slot = std::move(unused_.back());
    unused_.pop_back();
  }
  slot->cluster = Cluster{};
  slot->cluster.live_threads = uint32_t(config.block.count() * size.count());
  const Dim3 clusters{config.grid.x / size.x, config.grid.y / size.y, config.grid.z / size.z};
  const Dim3 at = index_of(number, clusters);
  for (uint32_t rank = 0; rank < slot->slots.size(); ++rank) {
    const Dim3 in = index_of(rank, size);
    const Dim3 index{at.x * size.x + in.x, at.y * size.y + in.y, at.z * size.z + in.z};
    start_cta(*slot->slots[rank], slot->cluster, index, rank);
    slot->cluster.ctas.push_back(&slot->slots[rank]->cta);
  }
  for (Cta* cta : slot->cluster.ctas) launch_.checker->start(*cta);
  running_.push_back(std::move(slot));
}

Worker::~Worker() {
  while (!running_.empty()) finish_cluster(running_.size() - 1);
}

void Worker::finish_cluster(size_t i) {
  std::unique_ptr<ClusterSlot> slot = std::move(running_[i]);
  running_[i] = std::move(running_.back());
  running_.pop_back();
  Checker& checker = *launch_.checker;
  const auto drop = [&checker](void*& clock) {
    if (!clock) return;
    SyncVar variable{clock};
    checker.drop(variable);
    clock = nullptr;
  };
  for (void*& clock : slot->cluster.clocks) drop(clock);
  for (Cta* cta : slot->cluster.ctas) {
    for (NamedBarrier& barrier : cta->barriers) drop(barrier.clock);
    barriers_passed_ += cta->barriers_passed;
  }
  for (Cta* cta : slot->cluster.ctas) checker.finish(*cta);
  unused_.push_back(std::move(slot));
}

void Worker::admit() {
  while (running_.size() < window_) {
    const uint64_t number = queue_.next_cluster.fetch_add(1, std::memory_order_relaxed);
    if (number >= queue_.num_clusters) return;
    start_cluster(number);
  }
}

// Makes room for more CTAs at a time; false where the device has none.
bool Worker::grow() {
  if (window_ >= queue_.max_resident) return false;
  window_ = std::min(queue_.max_resident, window_ * 2);
  return queue_.next_cluster.load(std::memory_order_relaxed) < queue_.num_clusters;
}

CtaSlot* Worker::choose_cta() {
  const uint32_t size = uint32_t(launch_.config.cluster.count());
  const uint32_t total = uint32_t(running_.size()) * size;
  const uint32_t first = random_.below(total);
  for (uint32_t i = 0; i < total; ++i) {
    const uint32_t at = (first + i) % total;
    CtaSlot& slot = *running_[at / size]->slots[at % size];
    if (!slot.cta.ready.empty()) return &slot;
  }
  return nullptr;
}

void Worker::end_warp(Cta& cta) {
  if (--cta.live_warps == 0) launch_.checker->end(cta);
}

uint64_t Worker::run_turn(CtaSlot& slot) {
  Cta& cta = slot.cta;
  const uint64_t budget = random_.length(slot.speed);
  uint64_t spent = 0, executed = 0, fruitful_at = 0, progress = progress_;
  uint32_t blocked = 0;
  while (spent < budget && !cta.ready.empty()) {
    const uint32_t i = random_.below(uint32_t(cta.ready.size()));
    Warp& warp = *cta.ready[i];
    const bool forced =
        !warp.others.empty() && (warp.yielded || warp.diverged_for > kDivergencePatience);
    uint64_t done = 0;
    const SliceEnd end =
        run_slice(warp, plan_, counts_.data(), random_.length(kWarpSlice), forced, &done);
    executed += done;
    spent += done + 1;
    clock_ += done;
    warp.yielded = end == SliceEnd::kYielded;
    if (end == SliceEnd::kDone) {
      remove_ready(cta, i);
      end_warp(cta);
    } else if (end == SliceEnd::kBlocked && !has_wait(warp, Wait::kPoll)) {
      remove_ready(cta, i);
    } else if (end == SliceEnd::kYielded) {
      spent += budget / 16;  // it waits for others, perhaps of another CTA
      ++yields_;
    }
    blocked = done == 0 ? blocked + 1 : 0;
    if (blocked > 2 * cta.ready.size() + 8) break;
    if (progress != progress_) {
      progress = progress_;
      fruitful_at = spent;
    } else if (spent - fruitful_at > kFruitless) {
      break;
    }
  }
  return executed;
}

// One try for every warp; false if none of them got anywhere.
bool Worker::poll_all() {
  uint64_t executed = 0;
  for (const auto& cluster : running_) {
    for (const auto& slot : cluster->slots) {
      Cta& cta = slot->cta;
      for (size_t i = 0; i < cta.ready.size();) {
        Warp& warp = *cta.ready[i];
        const SliceEnd end = run_slice(warp, plan_, counts_.data(), 64, false, &executed);
        if (end == SliceEnd::kDone) end_warp(cta);
        const bool remove =
            end == SliceEnd::kDone || (end == SliceEnd::kBlocked && !has_wait(warp, Wait::kPoll));
        if (remove)
          remove_ready(cta, i);
        else
          ++i;
      }
    }
  }
  return executed != 0;
}

// Lets barriers make do with a part of a warp where nothing else can go on.
bool Worker::free_stuck_warps() {
  bool any = false;
  for (const auto& cluster : running_) {
    for (const auto& slot : cluster->slots) {
      for (Warp& warp : slot->cta.warps) {
        if (warp.done() || warp.stuck || !has_wait(warp, Wait::kConverge)) continue;
        warp.retry(Wait::kConverge);
        slot->cta.wake(warp);
        warp.stuck = true;
        any = true;
      }
    }
  }
  return any;
}

// Every warp that can run has ended its last slice with a failed wait.
bool Worker::all_yield() const {
  for (const auto& cluster : running_) {
    for (const Cta* cta : cluster->cluster.ctas) {
      if (!std::ranges::all_of(cta->ready, &Warp::yielded)) return false;
    }
  }
  return true;
}

void Worker::check_hang(uint64_t executed) {
  if (progress_ != seen_progress_) {
    seen_progress_ = progress_;
    without_progress_ = yields_ = 0;
    shared_progress_ = queue_.progress.fetch_add(1, std::memory_order_relaxed) + 1;
    return;
  }
  const uint64_t before = without_progress_;
  without_progress_ += executed;
  if (without_progress_ / kGrowAfter != before / kGrowAfter && grow()) return;
  const bool only_waits = yields_ >= kFruitlessYields && !grow() && all_yield();
  if (without_progress_ < launch_.options.hang_budget && !only_waits) return;
  const uint64_t shared = queue_.progress.load(std::memory_order_relaxed);
  if (shared != shared_progress_) {
    shared_progress_ = shared;
    without_progress_ = yields_ = 0;
    return;
  }
  throw LaunchFailure(kErrorLaunchTimeout,
                      "kernel " + launch_.program->name +
                          " hangs: " + std::to_string(without_progress_) +
                          " warp instructions without a change that another warp could wait for\n" +
                          describe_waiting(running_));
}

// Nothing that is resident can run.
void Worker::resolve_standstill() {
  if (poll_all() || grow() || free_stuck_warps()) return;
  throw LaunchFailure(kErrorLaunchTimeout, "deadlock in kernel " + launch_.program->name + "\n" +
                                               describe_waiting(running_));
}

void Worker::run() {
  uint64_t idle_turns = 0;
  for (admit(); !running_.empty(); admit()) {
    if (queue_.failed.load(std::memory_order_relaxed)) return;
    CtaSlot* const slot = choose_cta();
    const uint64_t executed = slot ? run_turn(*slot) : 0;
    idle_turns = executed != 0 ? 0 : idle_turns + 1;
    if (!slot || idle_turns > 4 * running_.size() + 8) {
      resolve_standstill();
      idle_turns = 0;
    }
    for (size_t i = 0; i < running_.size();) {
      if (running_[i]->cluster.live_threads == 0)
        finish_cluster(i);
      else
        ++i;
    }
    check_hang(executed);
  }
}

}  // namespace fused_peft::sim
