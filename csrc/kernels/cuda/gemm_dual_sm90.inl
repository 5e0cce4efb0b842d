// launch_gemm_sm90 for one element type; included by gemm_dual_{bf16,f16}_sm90.cu.
#include <type_traits>

#include "kernels/cuda/gemm_dual_sm90.cuh"
#include "kernels/cuda/instances.h"

namespace fused_peft::cuda {
namespace {

// Stages fill what shared memory the store buffers leave.
using WideTile = GemmSm90Tile<128, 256, 4, false>;
using SquareTile = GemmSm90Tile<128, 128, 6, true>;
using SmallTile = GemmSm90Tile<64, 64, 8, true>;

template <class Tile>
Status fill_params(const GemmVariant& v, const GemmParams& gemm, DType dtype, GemmSm90Params* p) {
  p->m = static_cast<int32_t>(gemm.m);
  p->n = static_cast<int32_t>(gemm.n);
  p->tiles_m = static_cast<int32_t>(ceil_div(gemm.m, Tile::BLOCK_M));
  p->tiles_n = static_cast<int32_t>(ceil_div(gemm.n, Tile::BLOCK_N));
  p->raster_rows = v.choice.raster_rows;
  p->cluster = v.choice.cluster;
  p->dependent_source = v.dependent_source;
  p->dropout = gemm.dropout;
  p->bias = gemm.bias;
  Status status = Status::kOk;
  const auto encode = [&](const void* data, int64_t rows, int64_t columns, int64_t stride,
                          int box_rows, CUtensorMap* map) {
    if (status == Status::kOk)
      status = encode_tensor_map({data, rows, columns, stride, box_rows, dtype}, map);
  };
  for (int i = 0; i < 2; ++i) {
    const GemmSource& source = gemm.source[i];
    p->k[i] = source.k;
    encode(source.a, gemm.m, source.k, source.a_stride, Tile::BLOCK_M, &p->a[i]);
    if (v.b_k_major)
      encode(source.b, gemm.n, source.k, source.b_stride, Tile::BLOCK_N / v.choice.cluster,
             &p->b[i]);
    else
      encode(source.b, source.k, gemm.n, source.b_stride, Tile::BLOCK_K, &p->b[i]);
  }
  encode(gemm.c, gemm.m, gemm.n, gemm.c_stride, Tile::kStoreBoxRows, &p->c);
  return status;
}

template <class Element, class Tile>
Status launch_tile(const GemmVariant& v, const GemmParams& gemm, const LaunchContext& context,
                   bool dependent) {
  GemmSm90Params p;
  constexpr DType kDType =
      std::is_same_v<Element, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16;
  const Status status = fill_params<Tile>(v, gemm, kDType, &p);
  if (status != Status::kOk) return status;
  const auto run = [&](auto kernel) {
    return launch_clusters(kernel, dim3(unsigned(v.choice.ctas)), v.choice.cluster, Tile::kThreads,
                           Tile::kSharedBytes, context, dependent, p);
  };
  if (v.b_k_major)
    return v.mask ? run(gemm_dual_sm90_kernel<Element, Tile, true, true>)
                  : run(gemm_dual_sm90_kernel<Element, Tile, true, false>);
  return v.mask ? run(gemm_dual_sm90_kernel<Element, Tile, false, true>)
                : run(gemm_dual_sm90_kernel<Element, Tile, false, false>);
}

}  // namespace

template <class Element>
Status launch_gemm_sm90(const GemmVariant& v, const GemmParams& gemm, const LaunchContext& context,
                        bool dependent) {
  if (v.choice.block_n == WideTile::BLOCK_N)
    return launch_tile<Element, WideTile>(v, gemm, context, dependent);
  return v.choice.block_m == SquareTile::BLOCK_M
             ? launch_tile<Element, SquareTile>(v, gemm, context, dependent)
             : launch_tile<Element, SmallTile>(v, gemm, context, dependent);
}

}  // namespace fused_peft::cuda
