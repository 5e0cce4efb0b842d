#include "kernels/cuda/lora_single_sm90.inl"

namespace fused_peft::cuda {
template Status launch_single_backward<__half>(const LoraLinearBackward&, const TermsOut&, float*,
                                               const GemmChoice&, const LaunchContext&);
}
