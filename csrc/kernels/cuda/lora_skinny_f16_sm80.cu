#include "kernels/cuda/lora_skinny_sm80.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_SKINNY(__half, __half)
FUSED_PEFT_INSTANTIATE_SKINNY(__half, float)
}  // namespace fused_peft::cuda
