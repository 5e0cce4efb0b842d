#include "binding/cuda_device.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>
#include <vector>

#ifdef FUSED_PEFT_SIMULATED_CUDA
extern "C" {
void fused_peft_sim_register(const void* address, uint64_t bytes, int initialised,
                             const char* name);
int fused_peft_sim_unregister(const void* address);
}
#else
// Weak: null in a process whose torch was built without CUDA, where no CUDA tensor can reach this
// file.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));
#endif

namespace fused_peft {
namespace {

cuda::DeviceFacts read_facts(int device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
    STD_TORCH_CHECK(error == cudaSuccess,
                    "fused_peft: cudaDeviceGetAttribute: ", cudaGetErrorString(error));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrComputeCapabilityMajor)};
}

#ifndef FUSED_PEFT_SIMULATED_CUDA
constexpr int kMaxDevices = 64;

const cuda::DeviceFacts& facts_of(int device) {
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<cuda::DeviceFacts, kMaxDevices> facts;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "fused_peft: device index ", device);
  std::call_once(once[device], [&] { facts[device] = read_facts(device); });
  return facts[device];
}
#endif

}  // namespace

struct DeviceScope::Impl {
  std::vector<Tensor> kept;
#ifdef FUSED_PEFT_SIMULATED_CUDA
  std::vector<const void*> registered;

  void add(const Tensor& tensor, bool initialised) {
    const void* address = tensor.const_data_ptr();
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) == 0) return;
      last += (tensor.size(d) - 1) * tensor.stride(d);
    }
    for (const void* known : registered)
      if (known == address) return;
    fused_peft_sim_register(address, uint64_t(last + 1) * tensor.element_size(), initialised,
                            "tensor");
    registered.push_back(address);
  }
  ~Impl() {
    for (const void* address : registered) fused_peft_sim_unregister(address);
  }
#else
  torch::stable::accelerator::DeviceGuard guard;
  explicit Impl(int device) : guard(device) {}
#endif
};

#ifdef FUSED_PEFT_SIMULATED_CUDA

DeviceScope::DeviceScope(const Tensor& x) : impl_(new Impl) {
  STD_TORCH_CHECK(x.is_cpu(), "fused_peft: the simulated device takes tensors on the CPU");
  context_.device = read_facts(0);  // the device under simulation may change
}
void DeviceScope::reads(const Tensor& tensor) { impl_->add(tensor, true); }
void DeviceScope::writes(const Tensor& tensor) { impl_->add(tensor, false); }

#else

DeviceScope::DeviceScope(const Tensor& x) : impl_(new Impl(x.get_device_index())) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fused_peft: this torch has no CUDA");
  aoti_torch_get_current_cuda_stream(x.get_device_index(), &context_.stream);
  context_.device = facts_of(x.get_device_index());
}
void DeviceScope::reads(const Tensor&) {}
void DeviceScope::writes(const Tensor&) {}

#endif

DeviceScope::~DeviceScope() { delete impl_; }

void* DeviceScope::workspace(const Tensor& like, int64_t bytes) {
  if (bytes == 0) return nullptr;
  constexpr int64_t kAlignment = 256;
  Tensor memory = torch::stable::new_empty(like, {bytes + kAlignment}, ScalarType::Byte);
  impl_->kept.push_back(memory);
  writes(memory);
  const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

const uint64_t* DeviceScope::seed(const std::optional<Tensor>& seed, double dropout_p,
                                  const Tensor& x) {
  if (dropout_p == 0.0) return nullptr;
  STD_TORCH_CHECK(seed.has_value(), "fused_peft: seed is None; dropout_p > 0 needs one");
  STD_TORCH_CHECK(
      seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu() == x.is_cpu(),
      "fused_peft: seed must be an int64 tensor with one element on x's device");
  reads(*seed);
  return static_cast<const uint64_t*>(seed->const_data_ptr());
}

void check_launch_status(Status status, const char* op) {
  STD_TORCH_CHECK(status != Status::kLaunchFailed, "fused_peft: ", op, ": ",
                  cudaGetErrorString(cudaPeekAtLastError()));
  STD_TORCH_CHECK(status == Status::kOk, "fused_peft: ", op,
                  " has no CUDA kernel for this problem");
}

}  // namespace fused_peft
