// launch_dy_pass_sm90 for one element type; included by lora_dy_pass_{bf16,f16}_sm90.cu.
#include <type_traits>

#include "kernels/cuda/instances.h"
#include "kernels/cuda/lora_dy_pass_sm90.cuh"

namespace fused_peft::cuda {
namespace {

template <class Element, class Factor, int kRank, int kRows>
Status launch_dy_tile(const SkinnyChoice& choice, const DyPassParams& params, DType dtype,
                      int64_t extra_ctas, const LaunchContext& context) {
  using Tile = DyPassTile<Factor, kRank, kRows>;
  const DType factor_dtype = sizeof(Factor) == 4 ? DType::kFloat32 : dtype;
  CUtensorMap dy, lora_b;
  Status status = encode_tensor_map(
      {params.dy, params.m, params.n, params.dy_stride, kRows, dtype, Tile::kColumns}, &dy);
  if (status == Status::kOk)
    status = encode_tensor_map({params.lora_b, params.n, params.r, params.lora_b_stride,
                                kSkinnyBlockRows, factor_dtype, Tile::Narrow::kPanelColumns},
                               &lora_b);
  if (status != Status::kOk) return status;
  const int64_t extra = ceil_div(extra_ctas, choice.cluster) * choice.cluster;
  return launch_clusters(dy_pass_sm90_kernel<Element, Factor, kRank, kRows>,
                         dim3(unsigned(choice.ctas + extra)), choice.cluster, Tile::kThreads,
                         Tile::kSharedBytes, context, false, params, dy, lora_b);
}

}  // namespace

template <class Element, class Factor>
Status launch_dy_pass_sm90(const SkinnyChoice& choice, const DyPassParams& params, DType dtype,
                           int64_t extra_ctas, const LaunchContext& context) {
  const auto launch = [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    if constexpr (sizeof(Factor) == 2)
      if (choice.row_blocks == 8)
        return launch_dy_tile<Element, Factor, kRank, 128>(choice, params, dtype, extra_ctas,
                                                           context);
    return launch_dy_tile<Element, Factor, kRank, 64>(choice, params, dtype, extra_ctas, context);
  };
  return choice.rank == 16 ? launch(std::integral_constant<int, 16>{})
                           : launch(std::integral_constant<int, 64>{});
}

}  // namespace fused_peft::cuda

#define FUSED_PEFT_INSTANTIATE_DY_PASS(Element, Factor)                                          \
  template Status launch_dy_pass_sm90<Element, Factor>(const SkinnyChoice&, const DyPassParams&, \
                                                       DType, int64_t, const LaunchContext&);
