#include "kernels/cuda/lora_backward_sm80.inl"

namespace fused_peft::cuda {
FUSED_PEFT_INSTANTIATE_BACKWARD(__nv_bfloat16, __nv_bfloat16)
FUSED_PEFT_INSTANTIATE_BACKWARD(__nv_bfloat16, float)
template Status launch_reduce<__nv_bfloat16>(const ReduceParams&, const LaunchContext&);
template Status launch_column_sum<__nv_bfloat16>(const void*, int64_t, int64_t, int64_t, void*,
                                                 const LaunchContext&);
}  // namespace fused_peft::cuda
