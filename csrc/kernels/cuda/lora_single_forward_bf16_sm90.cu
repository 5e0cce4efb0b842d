#include "kernels/cuda/lora_single_sm90.inl"

namespace fused_peft::cuda {
template Status launch_single_forward<__nv_bfloat16>(const LoraLinearForward&, const GemmChoice&,
                                                     const LaunchContext&);
}
