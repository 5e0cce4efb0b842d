#include "kernels/cuda/prefix_attention_forward_sm80.inl"

namespace fused_peft::cuda {
template Status launch_attention_forward<__half>(const PrefixAttentionPlan&,
                                                 const AttentionForwardParams&,
                                                 const LaunchContext&);
}  // namespace fused_peft::cuda
