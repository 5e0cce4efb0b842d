#include "simulator/program/constant_pool.h"

#include <cstring>

namespace fused_peft::sim {
namespace {

constexpr uint32_t kAlign = 64;

Operand operand_at(uint32_t offset, uint32_t bytes) {
  Operand operand;
  operand.offset = offset;
  operand.space = 1;
  operand.bytes = uint8_t(bytes);
  return operand;
}

}  // namespace

void ConstantPool::broadcast(uint32_t offset, uint64_t low, uint64_t high, uint32_t bytes) {
  const uint64_t value[2] = {low, high};
  for (int lane = 0; lane < kLanes; ++lane) {
    std::memcpy(program_.constants.data() + offset + std::size_t(lane) * bytes, value, bytes);
  }
}

uint32_t ConstantPool::append(uint64_t low, uint64_t high, uint32_t bytes) {
  const auto offset = uint32_t(program_.constants.size());
  program_.constants.resize(offset + (bytes * kLanes + kAlign - 1) / kAlign * kAlign);
  broadcast(offset, low, high, bytes);
  return offset;
}

Operand ConstantPool::number(uint64_t low, uint64_t high, uint32_t bytes) {
  if (bytes < 8) low &= (uint64_t{1} << (8 * bytes)) - 1;
  if (bytes < 16) high = 0;
  const auto [place, is_new] = offsets_.try_emplace({bytes, {low, high}}, 0);
  if (is_new) place->second = append(low, high, bytes);
  return operand_at(place->second, bytes);
}

Operand ConstantPool::predicate(bool value) {
  Operand operand = number(value ? kFullMask : 0, 0, sizeof(LaneMask));
  operand.bytes = 0;
  return operand;
}

Operand ConstantPool::patched(uint64_t addend, uint32_t bytes) {
  const uint32_t offset = append(0, 0, bytes);
  patches_.push_back({offset, bytes, addend});
  return operand_at(offset, bytes);
}

void ConstantPool::set_patched(uint64_t base) {
  for (const Patch& patch : patches_) broadcast(patch.offset, base + patch.addend, 0, patch.bytes);
}

}  // namespace fused_peft::sim
