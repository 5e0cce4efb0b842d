// launch_decode_sm90 for one element type; included by lora_decode_{bf16,f16}_sm90.cu.
#include <utility>

#include "kernels/cuda/instances.h"
#include "kernels/cuda/lora_decode_sm90.cuh"

namespace fused_peft::cuda {
namespace {

MatrixTiling tiling(const MatrixView& view, int64_t rows, int64_t columns, int box_rows,
                    int box_columns = kSwizzledColumns) {
  return {view.data, rows, columns, view.row_stride, box_rows, view.dtype, box_columns};
}

template <class Element, class Factor, int kRank>
Status launch_decode_rank(const LoraLinearForward& args, const DecodeChoice& choice,
                          const LaunchContext& context) {
  using Tile = DecodeTile<Factor, kRank>;
  const LoraLinearParams& p = args.problem;
  LoraDecodeSm90Params params;
  const std::pair<MatrixTiling, CUtensorMap*> maps[] = {
      {tiling(p.weight, p.n, p.k, Tile::kBlockN), &params.weight},
      {tiling(p.x, p.m, p.k, kSkinnyRows), &params.x},
      {tiling(p.lora_a, p.r, p.k, kRank, Tile::Stage::kPanelColumns), &params.lora_a}};
  for (const auto& [matrix, map] : maps)
    if (const Status status = encode_tensor_map(matrix, map); status != Status::kOk) return status;
  params.m = static_cast<int32_t>(p.m);
  params.n = static_cast<int32_t>(p.n);
  params.r = static_cast<int32_t>(p.r);
  params.k_blocks = static_cast<int32_t>(ceil_div(p.k, Tile::kBlockK));
  params.lora_b = p.lora_b.data;
  params.lora_b_stride = p.lora_b.row_stride;
  params.scaling = p.scaling;
  params.bias = p.bias.data;
  params.s = args.s;
  params.y = args.y;
  params.y_stride = args.y_row_stride;
  return launch_clusters(lora_decode_sm90_kernel<Element, Factor, kRank>,
                         dim3(unsigned(choice.ctas)), choice.cluster, Tile::kThreads,
                         Tile::kSharedBytes, context, false, params);
}

}  // namespace

template <class Element, class Factor>
Status launch_decode_sm90(const LoraLinearForward& args, const LoraLinearPlan& plan,
                          const LaunchContext& context) {
  return plan.down.rank == 16 ? launch_decode_rank<Element, Factor, 16>(args, plan.decode, context)
                              : launch_decode_rank<Element, Factor, 64>(args, plan.decode, context);
}

}  // namespace fused_peft::cuda

#define FUSED_PEFT_INSTANTIATE_DECODE(Element, Factor) \
  template Status launch_decode_sm90<Element, Factor>( \
      const LoraLinearForward&, const LoraLinearPlan&, const LaunchContext&);
