#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {

Space take_space(Decoding& d) {
  if (d.take(".global")) return Space::kGlobal;
  if (!d.take_one({".shared", ".shared::cta", ".shared::cluster"}).empty()) return Space::kShared;
  if (d.take(".local")) return Space::kLocal;
  if (d.take(".const")) return Space::kConst;
  if (!d.take_one({".param", ".param::entry", ".param::func"}).empty()) return Space::kParam;
  return Space::kGeneric;
}

Scope take_scope(Decoding& d, Scope otherwise) {
  const std::string_view scope = d.take_one({".cta", ".cluster", ".gpu", ".sys"});
  if (scope == ".cta") return Scope::kCta;
  if (scope == ".cluster") return Scope::kCluster;
  if (scope == ".gpu") return Scope::kDevice;
  if (scope == ".sys") return Scope::kSystem;
  return otherwise;
}

void take_order(Decoding& d, MemoryForm& form) {
  const std::string_view order =
      d.take_one({".weak", ".relaxed", ".acquire", ".release", ".acq_rel", ".volatile"});
  if (!order.empty() && order != ".weak") form.relaxed = true;
  form.acquire = order == ".acquire" || order == ".acq_rel";
  form.release = order == ".release" || order == ".acq_rel";
  d.take(".mmio");
  form.scope = take_scope(d, form.scope);
}

bool take_cache_hints(Decoding& d) {
  for (;;) {
    const std::string_view hint = d.take_one({".ca",
                                              ".cg",
                                              ".cs",
                                              ".lu",
                                              ".cv",
                                              ".wb",
                                              ".wt",
                                              ".nc",
                                              ".unified",
                                              ".L1::evict_normal",
                                              ".L1::evict_unchanged",
                                              ".L1::evict_first",
                                              ".L1::evict_last",
                                              ".L1::no_allocate",
                                              ".L2::evict_normal",
                                              ".L2::evict_first",
                                              ".L2::evict_last",
                                              ".level::eviction_priority",
                                              ".L2::64B",
                                              ".L2::128B",
                                              ".L2::256B",
                                              ".L2::cache_hint"});
    if (hint.empty()) return false;
    if (hint == ".L2::cache_hint") {
      take_cache_hints(d);
      return true;
    }
  }
}

uint32_t take_vector(Decoding& d) {
  const std::string_view vector = d.take_one({".v2", ".v4", ".v8"});
  return vector.empty() ? 1 : static_cast<uint32_t>(vector[2] - '0');
}

void decode_as(Decoding& d, std::string_view name) {
  const DecodeFunction decode = find_opcode(name);
  if (decode == nullptr) d.unsupported(std::string(name));
  decode(d);
}

void lane_addresses(const Warp& warp, const Operand& base, int64_t offset, uint64_t* address) {
  if (base.bytes == 4) {
    const uint32_t* from = lanes_of<uint32_t>(warp, base);
    const auto add = static_cast<uint32_t>(offset);
    for (int lane = 0; lane < kLanes; ++lane) address[lane] = from[lane] + add;
    return;
  }
  const uint64_t* from = lanes_of<uint64_t>(warp, base);
  const auto add = static_cast<uint64_t>(offset);
  for (int lane = 0; lane < kLanes; ++lane) address[lane] = from[lane] + add;
}

void check_address(Warp& warp, const Instr& instr, const Operand& base, LaneMask mask) {
  const LaneMask bad = mask & ~valid_lanes(warp, base);
  if (bad == 0) [[likely]]
    return;
  warp.cta->launch->checker->report(warp, instr, bad, FindingKind::kUninitialised,
                                    "the address was computed from uninitialised data");
}

void host_addresses(Warp& warp, Space space, const uint64_t* address, LaneMask lanes,
                    std::byte** host) {
  if (space == Space::kGlobal || space == Space::kConst) {
    for (int lane = 0; lane < kLanes; ++lane)
      host[lane] = reinterpret_cast<std::byte*>(address[lane]);
    return;
  }
  if (space == Space::kShared) {
    uint64_t ranks = 0;
    for (int lane = 0; lane < kLanes; ++lane) ranks |= address[lane] >> kSharedRankShift;
    if (ranks == 0) {
      const auto base = reinterpret_cast<uint64_t>(warp.cta->shared);
      for (int lane = 0; lane < kLanes; ++lane) {
        host[lane] = reinterpret_cast<std::byte*>(base + address[lane]);
      }
      return;
    }
  }
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    host[lane] = Checker::resolve(warp, space, address[lane], lane);
  }
}

}  // namespace fused_peft::sim
