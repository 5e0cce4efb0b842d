#include "kernels/cuda/lora_dy_pass_sm90.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_DY_PASS(__half, __half)
FUSED_PEFT_INSTANTIATE_DY_PASS(__half, float)
}  // namespace fused_peft::cuda
