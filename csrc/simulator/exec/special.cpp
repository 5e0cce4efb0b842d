#include "simulator/exec/special.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "simulator/core/cta.h"

namespace fused_peft::sim {
namespace {

// Of the thread's index in its block, and so on.
uint32_t thread_of(const Warp& warp, int lane) { return warp.index * kLanes + uint32_t(lane); }
const Dim3& block(const Warp& warp) { return warp.cta->launch->config.block; }
const Dim3& grid(const Warp& warp) { return warp.cta->launch->config.grid; }
const Dim3& cluster(const Warp& warp) { return warp.cta->launch->config.cluster; }
const Dim3& ctaid(const Warp& warp) { return warp.cta->index; }
const Program& program(const Warp& warp) { return *warp.program; }

// The address of the launch's grid workspace, 0 where it is not cooperative: nvcc's cooperative
// groups read it from %envreg1 (high half) and %envreg2 (cooperative_groups/details/driver_abi.h).
uint64_t grid_workspace(const Warp& warp) {
  const Launch& launch = *warp.cta->launch;
  return launch.config.cooperative ? reinterpret_cast<uint64_t>(launch.grid_workspace.data()) : 0;
}

#define VALUE(expression) \
  []([[maybe_unused]] const Warp& w, [[maybe_unused]] int lane) -> uint64_t { return (expression); }

template <class T>
Step read_clock(Warp& warp, const Instr& instr, LaneMask mask) {
  // Time passes between two reads even where nothing else does.
  const uint64_t now = (*warp.cta->clock += 16);
  T* out = dest_lanes<T>(warp, instr.dest(0));
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) out[lane] = T(now);
  }
  return Step::kNext;
}

Step read_high_clock(Warp& warp, const Instr& instr, LaneMask mask) {
  const uint64_t now = (*warp.cta->clock += 16);
  uint32_t* out = dest_lanes<uint32_t>(warp, instr.dest(0));
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) out[lane] = uint32_t(now >> 32);
  }
  return Step::kNext;
}

constexpr SpecialRegister kSpecials[] = {
    {"%tid.x", 4, VALUE(thread_of(w, lane) % block(w).x), nullptr, true},
    {"%tid.y", 4, VALUE(thread_of(w, lane) / block(w).x % block(w).y), nullptr, true},
    {"%tid.z", 4, VALUE(thread_of(w, lane) / block(w).x / block(w).y), nullptr, true},
    {"%tid.w", 4, VALUE(0), nullptr},
    {"%ntid.x", 4, VALUE(block(w).x), nullptr},
    {"%ntid.y", 4, VALUE(block(w).y), nullptr},
    {"%ntid.z", 4, VALUE(block(w).z), nullptr},
    {"%ntid.w", 4, VALUE(1), nullptr},
    {"%ctaid.x", 4, VALUE(ctaid(w).x), nullptr},
    {"%ctaid.y", 4, VALUE(ctaid(w).y), nullptr},
    {"%ctaid.z", 4, VALUE(ctaid(w).z), nullptr},
    {"%ctaid.w", 4, VALUE(0), nullptr},
    {"%nctaid.x", 4, VALUE(grid(w).x), nullptr},
    {"%nctaid.y", 4, VALUE(grid(w).y), nullptr},
    {"%nctaid.z", 4, VALUE(grid(w).z), nullptr},
    {"%nctaid.w", 4, VALUE(1), nullptr},
    {"%laneid", 4, VALUE(uint64_t(lane)), nullptr, true},
    {"%warpid", 4, VALUE(w.index), nullptr},
    {"%nwarpid", 4, VALUE(uint64_t(w.cta->launch->device->threads_per_sm) / kLanes), nullptr},
    {"%smid", 4, VALUE(w.cta->sm), nullptr},
    {"%nsmid", 4, VALUE(uint64_t(w.cta->launch->device->num_sms)), nullptr},
    {"%gridid", 8, VALUE(w.cta->launch->number), nullptr},
    {"%is_explicit_cluster", 0, VALUE(cluster(w).count() > 1 || program(w).explicit_cluster),
     nullptr},
    {"%clusterid.x", 4, VALUE(ctaid(w).x / cluster(w).x), nullptr},
    {"%clusterid.y", 4, VALUE(ctaid(w).y / cluster(w).y), nullptr},
    {"%clusterid.z", 4, VALUE(ctaid(w).z / cluster(w).z), nullptr},
    {"%nclusterid.x", 4, VALUE(grid(w).x / cluster(w).x), nullptr},
    {"%nclusterid.y", 4, VALUE(grid(w).y / cluster(w).y), nullptr},
    {"%nclusterid.z", 4, VALUE(grid(w).z / cluster(w).z), nullptr},
    {"%cluster_ctaid.x", 4, VALUE(ctaid(w).x % cluster(w).x), nullptr},
    {"%cluster_ctaid.y", 4, VALUE(ctaid(w).y % cluster(w).y), nullptr},
    {"%cluster_ctaid.z", 4, VALUE(ctaid(w).z % cluster(w).z), nullptr},
    {"%cluster_nctaid.x", 4, VALUE(cluster(w).x), nullptr},
    {"%cluster_nctaid.y", 4, VALUE(cluster(w).y), nullptr},
    {"%cluster_nctaid.z", 4, VALUE(cluster(w).z), nullptr},
    {"%cluster_ctarank", 4, VALUE(w.cta->rank), nullptr},
    {"%cluster_nctarank", 4, VALUE(cluster(w).count()), nullptr},
    {"%lanemask_eq", 4, VALUE(uint64_t{1} << lane), nullptr, true},
    {"%lanemask_lt", 4, VALUE((uint64_t{1} << lane) - 1), nullptr, true},
    {"%lanemask_le", 4, VALUE((uint64_t{2} << lane) - 1), nullptr, true},
    {"%lanemask_gt", 4, VALUE(~((uint64_t{2} << lane) - 1)), nullptr, true},
    {"%lanemask_ge", 4, VALUE(~((uint64_t{1} << lane) - 1)), nullptr, true},
    {"%total_smem_size", 4, VALUE(w.cta->shared_bytes - kSharedStart), nullptr},
    {"%aggr_smem_size", 4, VALUE(w.cta->shared_bytes), nullptr},
    {"%dynamic_smem_size", 4, VALUE(w.cta->launch->config.dynamic_shared), nullptr},
    {"%reserved_smem_offset_begin", 4, VALUE(0), nullptr},
    {"%reserved_smem_offset_end", 4, VALUE(kSharedStart), nullptr},
    {"%reserved_smem_offset_cap", 4, VALUE(kSharedStart), nullptr},
    {"%reserved_smem_offset_0", 4, VALUE(0), nullptr},
    {"%reserved_smem_offset_1", 4, VALUE(kSharedStart / 2), nullptr},
    {"%envreg1", 4, VALUE(grid_workspace(w) >> 32), nullptr},
    {"%envreg2", 4, VALUE(grid_workspace(w) & 0xffffffff), nullptr},
    {"%clock", 4, nullptr, read_clock<uint32_t>},
    {"%clock_hi", 4, nullptr, read_high_clock},
    {"%clock64", 8, nullptr, read_clock<uint64_t>},
    {"%globaltimer", 8, nullptr, read_clock<uint64_t>},
    {"%globaltimer_lo", 4, nullptr, read_clock<uint32_t>},
    {"%globaltimer_hi", 4, nullptr, read_high_clock},
};
#undef VALUE

}  // namespace

const SpecialRegister* find_special(std::string_view name) {
  for (const SpecialRegister& special : kSpecials) {
    if (name == special.name) return &special;
  }
  return nullptr;
}

std::vector<const SpecialRegister*> resolve_specials(const Program& program) {
  std::vector<const SpecialRegister*> specials;
  for (const SpecialSlot& special : program.specials)
    specials.push_back(find_special(special.name));
  return specials;
}

namespace {

template <class T>
void fill_slot(const Warp& warp, const SpecialRegister& special, std::byte* slot) {
  T* lanes = reinterpret_cast<T*>(slot);
  if (special.per_lane) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = T(special.value(warp, lane));
  } else {
    std::fill_n(lanes, kLanes, T(special.value(warp, 0)));
  }
}

}  // namespace

void fill_specials(Warp& warp, const std::vector<const SpecialRegister*>& specials) {
  for (size_t i = 0; i < specials.size(); ++i) {
    const Operand& operand = warp.program->specials[i].slot;
    std::byte* const slot = warp.bases[0] + operand.offset;
    if (operand.bytes == 0) {
      const LaneMask all = specials[i]->value(warp, 0) ? kFullMask : 0;
      std::memcpy(slot, &all, sizeof all);
    } else if (operand.bytes == 4) {
      fill_slot<uint32_t>(warp, *specials[i], slot);
    } else {
      fill_slot<uint64_t>(warp, *specials[i], slot);
    }
    if (warp.valid && operand.reg != kNoRegister) warp.valid[operand.reg] = kFullMask;
  }
}

}  // namespace fused_peft::sim
