// Finds the decode function of an opcode among the families.
#include <string>
#include <unordered_map>

#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

using Table = std::unordered_map<std::string_view, DecodeFunction>;

Table build_table() {
  const OpcodeFamily* const families[] = {
      &kArithmeticFamily, &kFloatFamily,   &kCarryFamily,      &kBitsFamily,       &kPermuteFamily,
      &kPredicateFamily,  &kSelectFamily,  &kMoveFamily,       &kConvertFamily,    &kMathFamily,
      &kDotFamily,        &kVideoFamily,   &kMmaFamily,        &kMatrixMoveFamily, &kWgmmaFamily,
      &kBarrierFamily,    &kControlFamily, &kCallFamily,       &kWarpFamily,       &kMemoryFamily,
      &kAtomicFamily,     &kAddressFamily, &kAsyncCopyFamily,  &kMbarrierFamily,   &kBulkFamily,
      &kProxyFenceFamily, &kFenceFamily,   &kStoreAsyncFamily, &kTensorMapFamily,
  };
  Table table;
  for (const OpcodeFamily* family : families) {
    for (int i = 0; i < family->count; ++i)
      table.emplace(family->opcodes[i].name, family->opcodes[i].decode);
  }
  return table;
}

}  // namespace

DecodeFunction find_opcode(std::string_view name) {
  static const Table table = build_table();
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace fused_peft::sim
