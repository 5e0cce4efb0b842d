// The instruction set that the CPU ops use in this process.
#pragma once

#include "kernels/lora_linear.h"

namespace fused_peft::cpu {

Isa chosen_isa();

}  // namespace fused_peft::cpu
