// The launchers of prefix attention's kernels, one file an element type and pass so that they build
// in parallel.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/prefix_attention_dkv_sm80.cuh"
#include "kernels/cuda/prefix_attention_dq_sm80.cuh"
#include "kernels/cuda/prefix_attention_forward_sm80.cuh"

namespace fused_peft::cuda {

template <class Element>
Status launch_attention_forward(const PrefixAttentionPlan& plan,
                                const AttentionForwardParams& params, const LaunchContext& context);

template <class Element>
Status launch_attention_backward(const PrefixAttentionPlan& plan,
                                 const AttentionBackwardParams& params,
                                 const LaunchContext& context);

// Calls run with the plan's number of compiled columns as a type.
template <class Run>
Status with_head_tile(int32_t head, const Run& run) {
  switch (head) {
    case 64: return run(HeadTile<64>{});
    case 96: return run(HeadTile<96>{});
    case 128: return run(HeadTile<128>{});
    case 256: return run(HeadTile<256>{});
    default: return Status::kUnsupported;
  }
}

}  // namespace fused_peft::cuda
