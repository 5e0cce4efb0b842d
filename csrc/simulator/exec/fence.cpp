// membar and fence: memory ordering, which only the race checker needs; every access is done at
// once.
#include "simulator/check/checker.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

template <Scope kScope>
Step run_fence(Warp& warp, const Instr&, LaneMask) {
  warp.cta->launch->checker->fence(warp, kScope);
  return Step::kNext;
}

Handler fence_of(std::string_view scope) {
  if (scope == ".cta") return run_fence<Scope::kCta>;
  if (scope == ".cluster") return run_fence<Scope::kCluster>;
  if (scope == ".sys") return run_fence<Scope::kSystem>;
  return run_fence<Scope::kDevice>;
}

void decode_membar(Decoding& d) {
  if (d.has(".proxy")) d.unsupported("membar.proxy");
  const std::string_view scope = d.take_one({".cta", ".gl", ".sys"});
  if (scope.empty()) d.malformed("one of .cta, .gl, .sys");
  d.handler(fence_of(scope), InstrClass::kFence);
}

void decode_fence(Decoding& d) {
  if (d.has(".proxy")) {
    const DecodeFunction decode = find_opcode("fence.proxy");
    if (!decode) d.unsupported("fence.proxy");
    decode(d);
    return;
  }
  // fence.mbarrier_init orders the initialisation of mbarriers alone.
  const bool only_init = d.take(".mbarrier_init");
  d.take_one({".sc", ".acq_rel", ".acquire", ".release"});
  if (d.has(".sync_restrict")) d.unsupported("fence.sync_restrict");
  const std::string_view scope = d.take_one({".cta", ".cluster", ".gpu", ".sys"});
  if (scope.empty()) d.malformed("one of .cta, .cluster, .gpu, .sys");
  if (only_init && scope != ".cluster") d.malformed(".release.cluster behind .mbarrier_init");
  d.handler(fence_of(scope), InstrClass::kFence);
}

constexpr Opcode kOpcodes[] = {{"membar", decode_membar}, {"fence", decode_fence}};

}  // namespace

const OpcodeFamily kFenceFamily{"fence", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
