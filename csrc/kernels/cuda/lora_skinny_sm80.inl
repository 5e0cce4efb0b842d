// launch_down and launch_decode for one element type; included by lora_skinny_{bf16,f16}_sm80.cu.
#include "kernels/cuda/instances.h"

namespace fused_peft::cuda {

template <class Element, class Factor>
Status launch_down(int rank, const LoraDownParams& params, int64_t extra_ctas,
                   const LaunchContext& context) {
  const dim3 grid(unsigned(params.row_blocks + extra_ctas));
  const auto kernel = rank == 16   ? lora_down_kernel<Element, Factor, 16>
                      : rank == 64 ? lora_down_kernel<Element, Factor, 64>
                                   : lora_down_kernel<Element, Factor, 256>;
  return launch(kernel, grid, kSkinnyThreads, 0, context, false, params);
}

template <class Element, class Factor>
Status launch_decode(int rank, int64_t ctas, const LoraDecodeParams& params,
                     const LaunchContext& context) {
  const auto kernel = rank == 16 ? lora_decode_kernel<Element, Factor, 16>
                                 : lora_decode_kernel<Element, Factor, 64>;
  return launch(kernel, dim3(unsigned(ctas)), kSkinnyThreads, 0, context, false, params);
}

}  // namespace fused_peft::cuda

#define FUSED_PEFT_INSTANTIATE_SKINNY(Element, Factor)                                  \
  template Status launch_down<Element, Factor>(int, const LoraDownParams&, int64_t,     \
                                               const LaunchContext&);                   \
  template Status launch_decode<Element, Factor>(int, int64_t, const LoraDecodeParams&, \
                                                 const LaunchContext&);
