#include "kernels/cuda/prefix_attention_backward_sm80.inl"

namespace fused_peft::cuda {
template Status launch_attention_backward<__half>(const PrefixAttentionPlan&,
                                                  const AttentionBackwardParams&,
                                                  const LaunchContext&);
}  // namespace fused_peft::cuda
