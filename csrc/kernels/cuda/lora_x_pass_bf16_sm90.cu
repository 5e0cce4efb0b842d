#include "kernels/cuda/lora_x_pass_sm90.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_X_PASS(__nv_bfloat16, __nv_bfloat16)
FUSED_PEFT_INSTANTIATE_X_PASS(__nv_bfloat16, float)
}  // namespace fused_peft::cuda
