#include "kernels/cuda/lora_backward_sm80.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_BACKWARD(__half, __half)
FUSED_PEFT_INSTANTIATE_BACKWARD(__half, float)
template Status launch_reduce<__half>(const ReduceParams&, const LaunchContext&);
template Status launch_column_sum<__half>(const void*, int64_t, int64_t, int64_t, void*,
                                          const LaunchContext&);
}  // namespace fused_peft::cuda
