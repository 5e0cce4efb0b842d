// The constants of a program, each broadcast to 32 lanes and kept once.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "simulator/core/program.h"

namespace fused_peft::sim {

class ConstantPool {
 public:
  explicit ConstantPool(Program& program) : program_(program) {}

  // `bytes` of one lane: 2, 4, 8 or 16.
  Operand number(uint64_t low, uint64_t high, uint32_t bytes);
  Operand predicate(bool value);
  // A number of its own that set_patched() gives its value: the offset of dynamic shared memory is
  // known last.
  Operand patched(uint64_t addend, uint32_t bytes);
  void set_patched(uint64_t base);

 private:
  uint32_t append(uint64_t low, uint64_t high, uint32_t bytes);
  void broadcast(uint32_t offset, uint64_t low, uint64_t high, uint32_t bytes);

  struct Patch {
    uint32_t offset, bytes;
    uint64_t addend;
  };
  Program& program_;
  std::map<std::pair<uint32_t, std::pair<uint64_t, uint64_t>>, uint32_t> offsets_;
  std::vector<Patch> patches_;
};

}  // namespace fused_peft::sim
