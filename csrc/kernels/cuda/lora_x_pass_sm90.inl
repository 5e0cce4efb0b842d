// launch_x_pass_sm90 for one element type; included by lora_x_pass_{bf16,f16}_sm90.cu.
#include "kernels/cuda/instances.h"
#include "kernels/cuda/lora_x_pass_sm90.cuh"

namespace fused_peft::cuda {
namespace {

template <class Element, class Factor, int kRank>
Status launch_x_rank(const SkinnyChoice& choice, const XPassParams& params, DType dtype,
                     int64_t extra_ctas, const LaunchContext& context) {
  using Tile = XPassTile<Factor, kRank>;
  const DType factor_dtype = sizeof(Factor) == 4 ? DType::kFloat32 : dtype;
  CUtensorMap x, ds;
  Status status = encode_tensor_map(
      {params.x, params.m, params.k, params.x_stride, kSkinnyBlockRows, dtype, Tile::kColumns}, &x);
  if (status == Status::kOk)
    status = encode_tensor_map({params.ds, params.m, params.r, params.ds_stride, kSkinnyBlockRows,
                                factor_dtype, Tile::Narrow::kPanelColumns},
                               &ds);
  if (status != Status::kOk) return status;
  const int64_t extra = ceil_div(extra_ctas, choice.cluster) * choice.cluster;
  return launch_clusters(x_pass_sm90_kernel<Element, Factor, kRank>,
                         dim3(unsigned(choice.ctas + extra)), choice.cluster, Tile::kThreads,
                         Tile::kSharedBytes, context, true, params, x, ds);
}

}  // namespace

template <class Element, class Factor>
Status launch_x_pass_sm90(const SkinnyChoice& choice, const XPassParams& params, DType dtype,
                          int64_t extra_ctas, const LaunchContext& context) {
  return choice.rank == 16
             ? launch_x_rank<Element, Factor, 16>(choice, params, dtype, extra_ctas, context)
             : launch_x_rank<Element, Factor, 64>(choice, params, dtype, extra_ctas, context);
}

}  // namespace fused_peft::cuda

#define FUSED_PEFT_INSTANTIATE_X_PASS(Element, Factor)                                         \
  template Status launch_x_pass_sm90<Element, Factor>(const SkinnyChoice&, const XPassParams&, \
                                                      DType, int64_t, const LaunchContext&);
