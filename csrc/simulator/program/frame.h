// Where the registers of a warp lie in its frame.
#pragma once

#include "simulator/core/program.h"

namespace fused_peft::sim {

// Each register has a slot and an index (into Warp::valid) of its own.
class Frame {
 public:
  static constexpr uint32_t kAlign = 64;

  Operand allocate(Type type);
  // Where the writes to "_" go.
  static Operand sink(Type type);

  uint32_t bytes() const { return bytes_; }
  uint32_t registers() const { return registers_; }

 private:
  static constexpr uint32_t kSinkBytes = 16 * kLanes;  // of the widest type, at offset 0
  uint32_t bytes_ = kSinkBytes, registers_ = 0;
  uint32_t next_predicate_ = 0, predicates_end_ = 0;  // predicates share cache lines, 16 to each
};

// Bytes of one lane in a register: the type's own, but no less than 2; 0 for a predicate.
uint32_t register_bytes(Type type);

}  // namespace fused_peft::sim
