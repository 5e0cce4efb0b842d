#include "kernels/cuda/gemm_dual_sm80.inl"

namespace fused_peft::cuda {
template Status launch_gemm<__nv_bfloat16>(const GemmVariant&, const GemmParams&,
                                           const LaunchContext&, bool);
}
