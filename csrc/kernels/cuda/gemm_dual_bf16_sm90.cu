#include "kernels/cuda/gemm_dual_sm90.inl"

namespace fused_peft::cuda {
template Status launch_gemm_sm90<__nv_bfloat16>(const GemmVariant&, const GemmParams&,
                                                const LaunchContext&, bool);
}
