#include "kernels/cuda/lora_single_sm90.inl"

namespace fused_peft::cuda {
template Status launch_single_forward<__half>(const LoraLinearForward&, const GemmChoice&,
                                              const LaunchContext&);
}
