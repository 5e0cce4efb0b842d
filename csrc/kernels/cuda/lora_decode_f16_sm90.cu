#include "kernels/cuda/lora_decode_sm90.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_DECODE(__half, __half)
FUSED_PEFT_INSTANTIATE_DECODE(__half, float)
}  // namespace fused_peft::cuda
