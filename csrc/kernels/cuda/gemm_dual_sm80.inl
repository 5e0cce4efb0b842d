// launch_gemm for one element type; included by gemm_dual_{bf16,f16}_sm80.cu.
#include "kernels/cuda/instances.h"

namespace fused_peft::cuda {
namespace {

using LargeTile = GemmTile<128, 128, 4>;
using SmallTile = GemmTile<64, 64, 4>;

template <class Element, class Tile, bool kBKMajor, int kDownRank, bool kAligned, bool kMask>
Status launch_one(const GemmChoice& choice, const GemmParams& params, const LaunchContext& context,
                  bool dependent) {
  const int shared = Tile::shared_bytes(kDownRank) + (kMask ? Tile::kMaskBytes : 0);
  return launch(gemm_dual_kernel<Element, Tile, kBKMajor, kDownRank, kAligned, kMask>,
                dim3(unsigned(choice.ctas)), Tile::kThreads, shared, context, dependent, params);
}

template <class Element, class Tile, bool kBKMajor, bool kAligned>
Status launch_plain(const GemmVariant& v, const GemmParams& params, const LaunchContext& context,
                    bool dependent) {
  return v.mask ? launch_one<Element, Tile, kBKMajor, 0, kAligned, true>(v.choice, params, context,
                                                                         dependent)
                : launch_one<Element, Tile, kBKMajor, 0, kAligned, false>(v.choice, params, context,
                                                                          dependent);
}

template <class Element, bool kAligned>
Status launch_fused(const GemmVariant& v, const GemmParams& params, const LaunchContext& context,
                    bool dependent) {
  return v.down_rank <= 16 ? launch_one<Element, SmallTile, true, 16, kAligned, false>(
                                 v.choice, params, context, dependent)
                           : launch_one<Element, SmallTile, true, 64, kAligned, false>(
                                 v.choice, params, context, dependent);
}

}  // namespace

template <class Element>
Status launch_gemm(const GemmVariant& v, const GemmParams& params, const LaunchContext& context,
                   bool dependent) {
  if (v.down_rank > 0)
    return v.aligned ? launch_fused<Element, true>(v, params, context, dependent)
                     : launch_fused<Element, false>(v, params, context, dependent);
  if (v.choice.block_m == 128)
    return v.b_k_major
               ? launch_plain<Element, LargeTile, true, true>(v, params, context, dependent)
               : launch_plain<Element, LargeTile, false, true>(v, params, context, dependent);
  if (v.aligned)
    return v.b_k_major
               ? launch_plain<Element, SmallTile, true, true>(v, params, context, dependent)
               : launch_plain<Element, SmallTile, false, true>(v, params, context, dependent);
  return v.b_k_major
             ? launch_plain<Element, SmallTile, true, false>(v, params, context, dependent)
             : launch_plain<Element, SmallTile, false, false>(v, params, context, dependent);
}

}  // namespace fused_peft::cuda
