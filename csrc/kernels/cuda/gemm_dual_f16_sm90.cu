#include "kernels/cuda/gemm_dual_sm90.inl"

namespace fused_peft::cuda {
template Status launch_gemm_sm90<__half>(const GemmVariant&, const GemmParams&,
                                         const LaunchContext&, bool);
}
