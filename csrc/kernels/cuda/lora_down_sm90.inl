// launch_down_sm90 for one element type; included by lora_down_{bf16,f16}_sm90.cu.
#include "kernels/cuda/instances.h"
#include "kernels/cuda/lora_down_sm90.cuh"

namespace fused_peft::cuda {
namespace {

template <class Element, class Factor, int kRank>
Status launch_down_rank(const SkinnyChoice& choice, const LoraDownParams& params, DType dtype,
                        int64_t extra_ctas, const LaunchContext& context) {
  using Tile = DownTile<Factor, kRank>;
  const DType factor_dtype = sizeof(Factor) == 4 ? DType::kFloat32 : dtype;
  const SkinnyRows &x = params.x, &lora_a = params.lora_a;
  CUtensorMap x_map, lora_a_map;
  Status status = encode_tensor_map({x.data, x.rows, params.k, x.stride, kDownRows, dtype}, &x_map);
  if (status == Status::kOk)
    status = encode_tensor_map({lora_a.data, lora_a.rows, params.k, lora_a.stride, kRank,
                                factor_dtype, Tile::Stage::kPanelColumns},
                               &lora_a_map);
  if (status != Status::kOk) return status;
  const int64_t extra = ceil_div(extra_ctas, choice.cluster) * choice.cluster;
  return launch_clusters(lora_down_sm90_kernel<Element, Factor, kRank>,
                         dim3(unsigned(choice.ctas + extra)), choice.cluster, Tile::kThreads,
                         Tile::kSharedBytes, context, false, params, x_map, lora_a_map);
}

}  // namespace

template <class Element, class Factor>
Status launch_down_sm90(const SkinnyChoice& choice, const LoraDownParams& params, DType dtype,
                        int64_t extra_ctas, const LaunchContext& context) {
  return choice.rank == 16
             ? launch_down_rank<Element, Factor, 16>(choice, params, dtype, extra_ctas, context)
             : launch_down_rank<Element, Factor, 64>(choice, params, dtype, extra_ctas, context);
}

}  // namespace fused_peft::cuda

#define FUSED_PEFT_INSTANTIATE_DOWN(Element, Factor)                                            \
  template Status launch_down_sm90<Element, Factor>(const SkinnyChoice&, const LoraDownParams&, \
                                                    DType, int64_t, const LaunchContext&);
