#include "binding/cuda_device.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/cuda/lora_linear_config.h"

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

namespace {

// Where launches of one device leave their state: a slice for each stream, and for each stream of
// each captured graph, whose replays may run beside what the stream does meanwhile. A graph may
// keep its slice's address for ever, so slices are never given back.
class SingleLaunchStates {
 public:
  // Not in a capture: memory that is zeroed there would be zeroed by every replay.
  void allocate(const Tensor& like) {
    memory_ =
        torch::stable::new_zeros(like, {kSlices * cuda::kSingleLaunchStateBytes}, ScalarType::Byte);
  }
  bool empty() const { return !memory_.has_value(); }
  const Tensor& memory() const { return *memory_; }

  void* slice(void* stream, unsigned long long capture) {
    const auto found = slices_.try_emplace({stream, capture}, slices_.size()).first;
    if (found->second >= kSlices) return nullptr;
    return static_cast<unsigned char*>(memory_->mutable_data_ptr()) +
           found->second * cuda::kSingleLaunchStateBytes;
  }

 private:
  static constexpr int64_t kSlices = 64;
  std::optional<Tensor> memory_;
  std::map<std::pair<void*, unsigned long long>, int64_t> slices_;
};

std::mutex states_mutex;
// Never destroyed: at exit the allocator may be gone first.
std::map<int, SingleLaunchStates>& states_of_devices() {
  static auto* states = new std::map<int, SingleLaunchStates>;
  return *states;
}

}  // namespace

void* DeviceScope::single_launch_state(const Tensor& like) {
  if (context_.device.major != 9) return nullptr;
  const std::lock_guard<std::mutex> lock(states_mutex);
  SingleLaunchStates& states = states_of_devices()[like.is_cpu() ? 0 : like.get_device_index()];
  unsigned long long capture = 0;
#ifndef FUSED_PEFT_SIMULATED_CUDA
  const auto stream = static_cast<cudaStream_t>(context_.stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamGetCaptureInfo(stream, &status, &capture) != cudaSuccess) return nullptr;
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  if (states.empty()) {
    if (status != cudaStreamCaptureStatusNone) return nullptr;
    states.allocate(like);
    // Other streams use it too.
    if (cudaStreamSynchronize(stream) != cudaSuccess) return nullptr;
  }
#else
  if (states.empty()) states.allocate(like);
  reads(states.memory());
#endif
  return states.slice(context_.stream, capture);
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
