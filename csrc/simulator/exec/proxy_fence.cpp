// fence.proxy: ordering between the generic proxy (ordinary loads and stores) and the asynchronous
// one (bulk copies, wgmma), tensor maps and aliases (PTX ISA 9.7.13.4).
#include <iterator>

#include "simulator/check/checker.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

Step run_async(Warp& warp, const Instr&, LaneMask) {
  warp.cta->launch->checker->proxy_fence(warp);
  return Step::kNext;
}

// Aliases of one address are one memory here, and a tensor map is read when it is used.
Step run_nothing(Warp&, const Instr&, LaneMask) { return Step::kNext; }

void decode_fence_proxy(Decoding& d) {
  d.take(".proxy");
  if (d.take(".alias")) return d.handler(run_nothing, InstrClass::kFence);
  if (d.take(".tensormap::generic")) {
    const std::string_view order = d.take_one({".release", ".acquire"});
    if (order.empty()) d.malformed(".release or .acquire");
    d.take_one({".cta", ".cluster", ".gpu", ".sys"});
    if (order == ".acquire") {
      d.address();
      d.immediate();  // 128
    }
    return d.handler(run_nothing, InstrClass::kFence);
  }
  if (!d.take_one({".async", ".async.global"}).empty()) {
    d.take_one({".global", ".shared::cta", ".shared::cluster"});
    return d.handler(run_async, InstrClass::kFence);
  }
  if (d.take(".async::generic")) {
    d.take_one({".acquire", ".release"});
    d.take_one({".sync_restrict::shared::cluster", ".sync_restrict::shared::cta"});
    d.take(".cluster");
    return d.handler(run_async, InstrClass::kFence);
  }
  d.unsupported("this form of fence.proxy");
}

constexpr Opcode kOpcodes[] = {{"fence.proxy", decode_fence_proxy}};

}  // namespace

const OpcodeFamily kProxyFenceFamily{"fence.proxy", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
