// launch_single for one element type; included by lora_single_{bf16,f16}_sm90.cu.
#include <type_traits>

#include "kernels/cuda/instances.h"
#include "kernels/cuda/lora_single_sm90.cuh"

namespace fused_peft::cuda {
namespace {

template <class Element, class Tile>
Status launch_single_tile(const LoraLinearForward& args, const GemmChoice& choice,
                          const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  LoraSingleParams single;
  single.m = static_cast<int32_t>(p.m);
  single.n = static_cast<int32_t>(p.n);
  single.k = static_cast<int32_t>(p.k);
  single.r = static_cast<int32_t>(p.r);
  single.tiles_m = static_cast<int32_t>(ceil_div(p.m, Tile::BLOCK_M));
  single.tiles_n = static_cast<int32_t>(ceil_div(p.n, Tile::BLOCK_N));
  single.raster_rows = choice.raster_rows;
  single.scaling = p.scaling;
  single.bias = p.bias.data;
  single.s = args.s;
  single.state = static_cast<SingleLaunchState*>(context.single_launch_state);
  Status status = Status::kOk;
  const auto encode = [&](const void* data, int64_t rows, int64_t columns, int64_t stride,
                          int box_rows, CUtensorMap* map) {
    if (status == Status::kOk)
      status = encode_tensor_map({data, rows, columns, stride, box_rows, p.x.dtype}, map);
  };
  encode(p.x.data, p.m, p.k, p.x.row_stride, Tile::BLOCK_M, &single.x);
  encode(p.weight.data, p.n, p.k, p.weight.row_stride, Tile::BLOCK_N, &single.weight);
  encode(p.lora_a.data, p.r, p.k, p.lora_a.row_stride, Tile::kDown, &single.lora_a);
  encode(p.lora_b.data, p.n, p.r, p.lora_b.row_stride, Tile::BLOCK_N, &single.lora_b);
  encode(args.y, p.m, p.n, args.y_row_stride, Tile::kStoreBoxRows, &single.c);
  if (status != Status::kOk) return status;
  return launch(lora_single_sm90_kernel<Element, Tile>, dim3(unsigned(choice.ctas)), Tile::kThreads,
                Tile::kSharedBytes, context, false, single);
}

template <class Element, int kDown>
Status launch_single_rank(const LoraLinearForward& args, const GemmChoice& choice,
                          const LaunchContext& context) {
  return choice.block_n == 256
             ? launch_single_tile<Element, LoraSingleTile<256, 3, kDown>>(args, choice, context)
             : launch_single_tile<Element, LoraSingleTile<64, 6, kDown>>(args, choice, context);
}

}  // namespace

template <class Element>
Status launch_single(const LoraLinearForward& args, const GemmChoice& choice,
                     const LaunchContext& context) {
  return args.problem.r <= 16 ? launch_single_rank<Element, 16>(args, choice, context)
                              : launch_single_rank<Element, 64>(args, choice, context);
}

}  // namespace fused_peft::cuda
