// Special registers (PTX ISA 10).
#pragma once

#include <string_view>
#include <vector>

#include "simulator/core/program.h"

namespace fused_peft::sim {

struct SpecialRegister {
  const char* name;  // "%tid.x"
  uint8_t bytes;     // 2, 4 or 8
  // Fixed for a thread's life: the value of one lane, for its slot in the frame
  // (Program::specials).
  uint64_t (*value)(const Warp& warp, int lane);
  // Otherwise: writes dest(0), which is `bytes` wide. The builder puts such an instruction before
  // every use.
  Handler read;
  bool per_lane = false;  // the value differs between the lanes of a warp
};

// nullptr: there is none of this name.
const SpecialRegister* find_special(std::string_view name);

// Of each of the program's specials, in its order.
std::vector<const SpecialRegister*> resolve_specials(const Program& program);
// Fills the slots of a warp that starts.
void fill_specials(Warp& warp, const std::vector<const SpecialRegister*>& specials);

}  // namespace fused_peft::sim
