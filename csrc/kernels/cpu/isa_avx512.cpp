// The kernels for one instruction set; CMakeLists.txt gives this file its compiler flags.
#define FUSED_PEFT_ISA avx512
#define FUSED_PEFT_VECTOR_BYTES 64
#define FUSED_PEFT_BF16_DOT 0
#define FUSED_PEFT_F16C 1
#include "kernels/cpu/table_impl.h"

namespace fused_peft::cpu {

const KernelTable* kernels_avx512() { return &avx512::kTable; }

}  // namespace fused_peft::cpu
