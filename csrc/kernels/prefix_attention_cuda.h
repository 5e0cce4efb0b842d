// Launchers of prefix attention's CUDA kernels (sm_80 and newer). See prefix_attention.h for the
// operation.
#pragma once

#include "kernels/cuda/prefix_attention_config.h"
#include "kernels/prefix_attention.h"

namespace fused_peft::cuda {

constexpr int64_t kAttentionAlignment = 16;

// bfloat16 or float16, D a multiple of 8 up to kAttentionMaxHeadDim, no dropout, fewer than 2^30
// queries, keys and prefix positions: else kUnsupported. Every row of every operand and output
// must begin at a multiple of kAttentionAlignment bytes.
bool supports(const PrefixAttentionParams& problem);

int64_t forward_workspace_bytes(const PrefixAttentionParams& problem, const DeviceFacts& device);
int64_t backward_workspace_bytes(const PrefixAttentionBackward& args, const DeviceFacts& device);

// lse is float. Bitwise the same in every run: no atomics.
Status prefix_attention_forward(const PrefixAttentionForward& args, const LaunchContext& context);
Status prefix_attention_backward(const PrefixAttentionBackward& args, const LaunchContext& context);

}  // namespace fused_peft::cuda
