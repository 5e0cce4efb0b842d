#include "kernels/cuda/prefix_attention_forward_sm80.inl"

namespace fused_peft::cuda {
template Status launch_attention_forward<__nv_bfloat16>(const PrefixAttentionPlan&,
                                                        const AttentionForwardParams&,
                                                        const LaunchContext&);
}  // namespace fused_peft::cuda
