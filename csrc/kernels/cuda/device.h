// What every CUDA launcher of the package takes: the device's facts, and where a launch runs.
#pragma once

#include <cstdint>

namespace fused_peft::cuda {

// What the choice depends on; cudaDeviceProp has these. No number of SMs is written down anywhere
// else.
struct DeviceFacts {
  int32_t num_sms = 0;
  int32_t shared_per_block = 0;  // the opt-in maximum, bytes
  int32_t major = 0;             // of the compute capability
};

// Where a launch runs. No launcher synchronises, allocates or reads device memory on the host, so
// all of them can be captured into a CUDA graph.
struct LaunchContext {
  void* stream = nullptr;  // cudaStream_t
  const uint64_t* seed =
      nullptr;  // device memory; read where dropout_p > 0 (LoraLinearParams::seed is not)
  // What launches leave for the next one, kSingleLaunchStateBytes of device memory: zero at first,
  // never shared by launches that may overlap. Null: the forward pass takes two launches.
  void* single_launch_state = nullptr;
  void* workspace = nullptr;  // device memory of at least *_workspace_bytes, 256-byte aligned
  DeviceFacts device;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rounded up, so that what follows in a workspace stays aligned.
constexpr int64_t workspace_bytes(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// Hands out a workspace, or, without one, only adds up what is asked for.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  void* take(int64_t bytes) {
    unsigned char* at = base_ ? base_ + used_ : nullptr;
    used_ += workspace_bytes(bytes);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace fused_peft::cuda
