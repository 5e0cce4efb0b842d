// Launchers of the LoRA layer's CUDA kernels (sm_80 and newer). See lora_linear.h for the
// operation.
#pragma once

#include "kernels/cuda/lora_linear_config.h"
#include "kernels/lora_linear.h"

namespace fused_peft::cuda {

LoraLinearShape shape_of(const LoraLinearParams& problem);

// x in bfloat16 or float16, lora_a and lora_b both in x's dtype or both float32, R <= kMaxRank:
// else kUnsupported.
bool supports(const LoraLinearParams& problem);

// Of the context's device and single_launch_state, and of all pointers; the launch then gets the
// same.
int64_t forward_workspace_bytes(const LoraLinearForward& args, const LaunchContext& context);
int64_t backward_workspace_bytes(const LoraLinearBackward& args, const LaunchContext& context);

Status lora_linear_forward(const LoraLinearForward& args, const LaunchContext& context);
Status lora_linear_backward(const LoraLinearBackward& args, const LaunchContext& context);

}  // namespace fused_peft::cuda
