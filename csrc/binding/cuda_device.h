// Where a CUDA launch runs: the tensors' device, its current stream and its facts. Compiled a
// second time against the simulator, whose device memory is host memory: tensors are then on the
// CPU, and are registered so that accesses are checked.
#pragma once

#include "binding/tensors.h"
#include "kernels/cuda/device.h"

#ifdef FUSED_PEFT_SIMULATED_CUDA
#define FUSED_PEFT_CUDA_NAMESPACE fused_peft_simulated
#define FUSED_PEFT_CUDA_KEY CPU
#else
#define FUSED_PEFT_CUDA_NAMESPACE fused_peft
#define FUSED_PEFT_CUDA_KEY CUDA
#endif

namespace fused_peft {

// Makes x's device current for its life.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& x);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  // A tensor that kernels read (its data is there) or write (its data is not).
  void reads(const Tensor& tensor);
  void writes(const Tensor& tensor);
  // Scratch memory from torch's allocator, 256-byte aligned, that lives as long as this object.
  void* workspace(const Tensor& like, int64_t bytes);
  // LaunchContext::single_launch_state, of this stream alone (in a capture, of this stream of this
  // graph); nullptr where there is none left.
  void* single_launch_state(const Tensor& like);
  // Device memory of the seed; nullptr without dropout.
  const uint64_t* seed(const std::optional<Tensor>& seed, double dropout_p, const Tensor& x);

  const cuda::DeviceFacts& facts() const { return context_.device; }
  cuda::LaunchContext& context() { return context_; }

 private:
  struct Impl;
  cuda::LaunchContext context_;
  Impl* impl_;
};

// Throws where the launch failed, with the runtime's own words.
void check_launch_status(Status status, const char* op);

}  // namespace fused_peft
