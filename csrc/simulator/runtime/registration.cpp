// What nvcc's generated host code calls before main and at each <<<>>>.
#include <vector>

#include "simulator/runtime/api.h"

namespace fused_peft::sim {
namespace {

struct CallConfiguration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};
thread_local std::vector<CallConfiguration> pushed_configurations;

// What __cudaRegisterFatBinary hands out: the stubs treat it as void**.
struct FatBinaryHandle {
  void* self = nullptr;
  std::shared_ptr<LoadedModule> module;
};

FatBinaryHandle* handle_of(void** handle) { return reinterpret_cast<FatBinaryHandle*>(handle); }

}  // namespace

HostKernel* find_kernel(const void* function) {
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  const auto found = process.kernels.find(function);
  if (found != process.kernels.end()) return found->second.get();
  for (const auto& [host, kernel] : process.kernels)
    if (kernel.get() == function) return kernel.get();
  return nullptr;
}

}  // namespace fused_peft::sim

using namespace fused_peft::sim;

FUSED_PEFT_SIM_API void** __cudaRegisterFatBinary(void* fat_binary) {
  auto* handle = new FatBinaryHandle;
  try {
    handle->module = std::make_shared<LoadedModule>(read_fat_binary(fat_binary));
  } catch (const std::exception& error) {
    // Nothing may be launched from it; another fat binary of the program may still be good.
    handle->module = std::make_shared<LoadedModule>(std::vector<PtxImage>{});
    handle->module->set_error(error.what());
  }
  return reinterpret_cast<void**>(handle);
}

FUSED_PEFT_SIM_API void __cudaRegisterFatBinaryEnd(void**) {}

FUSED_PEFT_SIM_API void __cudaUnregisterFatBinary(void** handle) {
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  const FatBinaryHandle* binary = handle_of(handle);
  std::erase_if(process.kernels,
                [&](const auto& entry) { return entry.second->module == binary->module; });
  std::erase_if(process.variables,
                [&](const auto& entry) { return entry.second.module == binary->module; });
  delete binary;
}

FUSED_PEFT_SIM_API char __cudaInitModule(void**) { return 1; }

FUSED_PEFT_SIM_API void __cudaRegisterFunction(void** handle, const char* host_function, char*,
                                               const char* device_name, int, uint3*, uint3*, dim3*,
                                               dim3*, int*) {
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  auto kernel = std::make_unique<HostKernel>();
  kernel->module = handle_of(handle)->module;
  kernel->name = device_name;
  process.kernels[host_function] = std::move(kernel);
}

FUSED_PEFT_SIM_API void __cudaRegisterVar(void** handle, char* host_variable, char*,
                                          const char* device_name, int, size_t size, int, int) {
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  process.variables[host_variable] = {handle_of(handle)->module, device_name, size};
}

FUSED_PEFT_SIM_API void __cudaRegisterManagedVar(void**, void**, char*, const char* name, int,
                                                 size_t, int, int) {
  stop_unimplemented("__cudaRegisterManagedVar", name);
}

FUSED_PEFT_SIM_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                                        cudaStream_t stream) {
  pushed_configurations.push_back({grid, block, shared, stream});
  return 0;
}

FUSED_PEFT_SIM_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                                          void* stream) {
  if (pushed_configurations.empty()) return set_error(cudaErrorMissingConfiguration);
  const CallConfiguration configuration = pushed_configurations.back();
  pushed_configurations.pop_back();
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  HostKernel* found = find_kernel(host_function);
  if (!found) return set_error(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(found);
  return cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block,
                                                  void** arguments, size_t shared,
                                                  cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

FUSED_PEFT_SIM_API cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block,
                                                       void** arguments, size_t shared,
                                                       cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
