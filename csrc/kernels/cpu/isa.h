// Run-time choice of the instruction set.
#pragma once

#include "kernels/cpu/kernel_table.h"
#include "kernels/lora_linear.h"

namespace fused_peft::cpu {

const KernelTable& kernel_table(Isa isa);

}  // namespace fused_peft::cpu
