// launch_single_forward and launch_single_backward for one element type; included by
// lora_single_{forward,backward}_{bf16,f16}_sm90.cu.
#include <initializer_list>

#include "kernels/cuda/instances.h"
#include "kernels/cuda/lora_single_sm90.cuh"

namespace fused_peft::cuda {
namespace {

struct SingleOperand {
  MatrixTiling tiling;
  CUtensorMap* map;
};

// c [M, n], reduced over k.
template <class Element, class Tile>
Status launch_single(LoraSingleParams& params, const LoraLinearParams& p, int64_t n, int64_t k,
                     std::initializer_list<SingleOperand> operands, const GemmChoice& choice,
                     const LaunchContext& context) {
  params.m = static_cast<int32_t>(p.m);
  params.n = static_cast<int32_t>(n);
  params.k = static_cast<int32_t>(k);
  params.r = static_cast<int32_t>(p.r);
  params.tiles_m = static_cast<int32_t>(ceil_div(p.m, Tile::BLOCK_M));
  params.tiles_n = static_cast<int32_t>(ceil_div(n, Tile::BLOCK_N));
  params.raster_rows = choice.raster_rows;
  params.cluster = choice.cluster;
  params.scaling = p.scaling;
  params.state = static_cast<SingleLaunchState*>(context.single_launch_state);
  for (const SingleOperand& operand : operands)
    if (const Status status = encode_tensor_map(operand.tiling, operand.map); status != Status::kOk)
      return status;
  return launch_clusters(lora_single_sm90_kernel<Element, Tile>, dim3(unsigned(choice.ctas)),
                         choice.cluster, Tile::kThreads, Tile::kSharedBytes, context, false,
                         params);
}

template <class Element, class Tile>
Status launch_forward_tile(const LoraLinearForward& args, const GemmChoice& choice,
                           const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  const auto rows = [&](const MatrixView& v, int64_t count, int64_t columns, int box_rows) {
    return MatrixTiling{v.data, count, columns, v.row_stride, box_rows, p.x.dtype};
  };
  LoraSingleParams single;
  single.bias = p.bias.data;
  single.s = args.s;
  return launch_single<Element, Tile>(
      single, p, p.n, p.k,
      {{rows(p.x, p.m, p.k, Tile::BLOCK_M), &single.a},
       {rows(p.weight, p.n, p.k, Tile::BLOCK_N / choice.cluster), &single.b},
       {rows(p.lora_a, p.r, p.k, Tile::kDown), &single.down},
       {rows(p.lora_b, p.n, p.r, Tile::BLOCK_N / choice.cluster), &single.update},
       {{args.y, p.m, p.n, args.y_row_stride, Tile::kStoreBoxRows, p.x.dtype}, &single.c}},
      choice, context);
}

template <class Element, class Tile>
Status launch_backward_tile(const LoraLinearBackward& args, const TermsOut& ds, float* parts,
                            const GemmChoice& choice, const LaunchContext& context) {
  const LoraLinearParams& p = args.problem;
  const auto rows = [&](const MatrixView& v, int64_t count, int64_t columns, int box_rows,
                        int box_columns = kSwizzledColumns) {
    return MatrixTiling{v.data, count, columns, v.row_stride, box_rows, p.x.dtype, box_columns};
  };
  LoraSingleParams single;
  single.saved_s = args.s;
  single.ds = ds.data;
  single.ds_stride = static_cast<int32_t>(ds.stride);
  single.dlora_b_parts = parts;
  return launch_single<Element, Tile>(
      single, p, p.k, p.n,
      {{rows(args.dy, p.m, p.n, Tile::BLOCK_M), &single.a},
       {rows(p.weight, p.n, p.k, Tile::BLOCK_K), &single.b},
       {rows(p.lora_b, p.n, p.r, Tile::BLOCK_K, Tile::kDown), &single.down},
       {rows(p.lora_a, p.r, p.k, Tile::kDown), &single.update},
       {{args.dx, p.m, p.k, p.k, Tile::kStoreBoxRows, p.x.dtype}, &single.c}},
      choice, context);
}

}  // namespace

// Stages fill what shared memory the other buffers leave.
template <class Element>
Status launch_single_forward(const LoraLinearForward& args, const GemmChoice& choice,
                             const LaunchContext& context) {
  const auto run = [&](auto tile) {
    return launch_forward_tile<Element, decltype(tile)>(args, choice, context);
  };
  const bool narrow = args.problem.r <= 16;
  if (choice.block_n == 256)
    return narrow ? run(LoraSingleTile<256, 3, 16, false>{})
                  : run(LoraSingleTile<256, 3, 64, false>{});
  return narrow ? run(LoraSingleTile<64, 6, 16, false>{}) : run(LoraSingleTile<64, 6, 64, false>{});
}

template <class Element>
Status launch_single_backward(const LoraLinearBackward& args, const TermsOut& ds, float* parts,
                              const GemmChoice& choice, const LaunchContext& context) {
  const auto run = [&](auto tile) {
    return launch_backward_tile<Element, decltype(tile)>(args, ds, parts, choice, context);
  };
  const bool narrow = args.problem.r <= 16;
  if (choice.block_n == 256)
    return narrow ? run(LoraSingleTile<256, 3, 16, true>{})
                  : run(LoraSingleTile<256, 3, 64, true>{});
  return narrow ? run(LoraSingleTile<64, 6, 16, true>{}) : run(LoraSingleTile<64, 5, 64, true>{});
}

}  // namespace fused_peft::cuda
