// A thread's own memory: .local variables, and parameters of device functions.
#include "simulator/check/bits.h"
#include "simulator/check/runs.h"
#include "simulator/check/state.h"

namespace fused_peft::sim {

namespace {

// Lanes whose address lies in the entry function's parameters: read only, the same for all threads.
LaneMask entry_parameter_lanes(const Warp& warp, const Access& access) {
  if (access.space != Space::kParam || access.kind != AccessKind::kRead) return 0;
  const uint64_t size = warp.cta->launch->config.params.size();
  return lanes_where(access.address, access.lanes, [&](uint64_t address) {
    return address <= size && access.bytes <= size - address;
  });
}

}  // namespace

LaneMask Checker::State::access_private(Warp& warp, const Instr& instr, const Access& access,
                                        LaneMask stored, LaneMask* valid) {
  const bool local = access.space == Space::kLocal;
  const uint64_t base = local ? 0 : kCalleeParam;
  const uint64_t size = local ? warp.program->local_bytes : warp.program->private_bytes;
  WarpState& me = state_of(warp);
  std::vector<uint64_t>& init = local ? me.local_init : me.private_init;
  const LaneMask entry = entry_parameter_lanes(warp, access);
  if (entry == access.lanes) {
    if (valid != nullptr) *valid = entry;
    return aligned_lanes(warp, instr, access);
  }
  const LaneMask lanes = aligned_lanes(warp, instr, access);
  const LaneMask inside = lanes_where(access.address, lanes, [&](uint64_t address) {
    return address >= base && address - base <= size && access.bytes <= size - (address - base);
  });
  if (inside != lanes) {
    const LaneMask bad = lanes & ~inside;
    report(warp, instr, bad, FindingKind::kOutOfBounds,
           std::string(verb(access.kind)) + " " + std::to_string(access.bytes) +
               " bytes at offset " + std::to_string(access.address[std::countr_zero(bad)] - base) +
               " of the thread's " + std::to_string(size) + " bytes of " +
               (local ? "local memory" : "parameters"));
  }
  LaneMask initialised = initcheck ? 0 : inside;
  if (initcheck) {
    for (LaneMask left = inside; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      const uint64_t first = lane * size + (access.address[lane] - base);
      const LaneMask bit = LaneMask{1} << lane;
      if (all_bits(init.data(), first, access.bytes)) initialised |= bit;
      if (access.kind == AccessKind::kRead) continue;
      if ((stored & bit) != 0) {
        set_bits(init.data(), first, access.bytes);
      } else {
        clear_bits(init.data(), first, access.bytes);
      }
    }
  }
  if (valid != nullptr) *valid = initialised | ~inside;
  if (local) {
    Tally& tally = state_of(*warp.cta).tally;
    const uint64_t bytes = uint64_t{access.bytes} * std::popcount(inside);
    if (access.kind != AccessKind::kWrite) tally.local_load_bytes += bytes;
    if (access.kind != AccessKind::kRead) tally.local_store_bytes += bytes;
  }
  return inside;
}

}  // namespace fused_peft::sim
