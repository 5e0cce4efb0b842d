#include "kernels/cuda/lora_skinny_sm80.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_SKINNY(__nv_bfloat16, __nv_bfloat16)
FUSED_PEFT_INSTANTIATE_SKINNY(__nv_bfloat16, float)
}  // namespace fused_peft::cuda
