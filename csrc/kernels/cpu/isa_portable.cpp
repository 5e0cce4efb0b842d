// The kernels for one instruction set; CMakeLists.txt gives this file its compiler flags.
#define FUSED_PEFT_ISA portable
#define FUSED_PEFT_VECTOR_BYTES 16
#define FUSED_PEFT_BF16_DOT 0
#define FUSED_PEFT_F16C 0
#include "kernels/cpu/table_impl.h"

namespace fused_peft::cpu {

const KernelTable* kernels_portable() { return &portable::kTable; }

}  // namespace fused_peft::cpu
