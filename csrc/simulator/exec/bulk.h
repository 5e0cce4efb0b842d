// Bulk copies: cp.async.bulk and cp.async.bulk.tensor share what happens once it is known which
// bytes go where.
#pragma once

#include <array>
#include <deque>

#include "simulator/core/decoder.h"
#include "simulator/exec/bulk_reduce.h"
#include "simulator/exec/mbarrier.h"

namespace fused_peft::sim {

enum class BulkKind : uint8_t { kLoad, kStore, kSharedToShared, kPrefetch };

// What the text of a bulk copy says. Instr::extra. Sources: [0] and [1] destination and source (a
// prefetch has only the source, a tensor map counts as one), then the coordinates, the mbarrier and
// the mask of CTAs as far as there are any.
struct BulkForm {
  BulkKind kind = BulkKind::kLoad;
  bool to_cluster = false;  // destination .shared::cluster
  Reduction reduction = Reduction::kNone;
  Combine combine = nullptr;  // its elements; of a tensor the map says what they are
  uint32_t rank = 0;          // of a tensor
  int64_t to_offset = 0, from_offset = 0, barrier_offset = 0;
  int size = -1, barrier = -1, multicast = -1;  // indices of sources; -1: absent
};

inline const BulkForm& bulk_form(const Instr& instr) {
  return *static_cast<const BulkForm*>(instr.extra);
}

// A copy out of shared memory, of one lane's bulk group.
struct BulkStore {
  const Instr* instr = nullptr;
  int lane = 0;
  uint64_t group = 0;
  bool moved = false;
  Combine combine = nullptr;  // of a reduction
  std::vector<CopyUnit> units;
};

// WarpAsync::bulk.
struct BulkGroups {
  std::deque<BulkStore> stores;
  std::array<uint64_t, kLanes> committed{};
};
BulkGroups& bulk_groups_of(Warp& warp);

// Starts what writes target's shared memory and completes on the mbarrier: the load's target, units
// and bytes are set.
void issue(Warp& warp, const Instr& instr, int lane, const MbarrierPlace& barrier,
           std::unique_ptr<BulkLoad> load);
// Into the shared memory of one CTA of the cluster; completes on the mbarrier at this address.
// `from` says where the bytes of the units come from.
void issue_load(Warp& warp, const Instr& instr, int lane, Cta& target, uint64_t barrier_address,
                std::vector<CopyUnit> units, Space from, const std::byte* fill);
void issue_store(Warp& warp, const Instr& instr, int lane, BulkStore store);

// Lanes that name the same copy issue it once: the instruction belongs to the warp, not to its
// lanes, in hardware. Returns the lanes that are left.
LaneMask distinct_lanes(const Warp& warp, const Instr& instr, LaneMask mask);

// Takes ".shared::cluster.global" and the like, cache hints, ".mbarrier::complete_tx::bytes" or
// ".bulk_group". Sets form.kind; returns whether a cache policy is the last operand.
bool take_bulk_qualifiers(Decoding& d, BulkForm& form, bool* multicast);
void take_reduction(Decoding& d, BulkForm& form);

// cp.async.bulk.tensor and cp.reduce.async.bulk.tensor, behind ".tensor".
void decode_tensor_copy(Decoding& d, BulkForm form, bool is_prefetch);

}  // namespace fused_peft::sim
