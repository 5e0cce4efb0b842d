#include "kernels/cuda/lora_down_sm90.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_DOWN(__half, __half)
FUSED_PEFT_INSTANTIATE_DOWN(__half, float)
}  // namespace fused_peft::cuda
