#include "simulator/program/frame.h"

#include <algorithm>
#include <utility>

namespace fused_peft::sim {

uint32_t register_bytes(Type type) {
  return type == Type::kPred ? 0 : std::max(2u, uint32_t(bytes_of(type)));
}

Operand Frame::allocate(Type type) {
  Operand operand;
  operand.bytes = uint8_t(register_bytes(type));
  operand.reg = registers_++;
  if (operand.bytes) {
    operand.offset = std::exchange(bytes_, bytes_ + operand.bytes * kLanes);
    return operand;
  }
  if (next_predicate_ == predicates_end_) {
    next_predicate_ = bytes_;
    predicates_end_ = bytes_ += kAlign;
  }
  operand.offset = std::exchange(next_predicate_, next_predicate_ + uint32_t(sizeof(LaneMask)));
  return operand;
}

Operand Frame::sink(Type type) {
  Operand operand;
  operand.bytes = uint8_t(register_bytes(type));
  operand.sink = true;
  return operand;
}

}  // namespace fused_peft::sim
