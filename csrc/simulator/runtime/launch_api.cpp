// Launches, function attributes and occupancy.
#include <algorithm>

#include "simulator/runtime/api.h"
#include "simulator/runtime/launch_rules.h"

namespace fused_peft::sim {
namespace {

Dim3 dims(const dim3& d) { return {d.x, d.y, d.z}; }

cudaError_t launch(const void* function, LaunchConfig config, void** arguments) {
  return guarded([&] {
    HostKernel* kernel = find_kernel(function);
    if (!kernel) return int(cudaErrorInvalidDeviceFunction);
    config.params = pack_params(kernel->module->module().kernel(kernel->name), arguments);
    return execute(*kernel, std::move(config));
  });
}

// The launch configuration of cudaLaunchKernelEx: cluster size, cooperative; the rest of the
// attributes that are known not to change results are let through.
LaunchConfig read_config(const cudaLaunchConfig_t& in) {
  LaunchConfig config;
  config.grid = dims(in.gridDim);
  config.block = dims(in.blockDim);
  config.dynamic_shared = uint32_t(in.dynamicSmemBytes);
  for (unsigned i = 0; i < in.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = in.attrs[i];
    switch (attribute.id) {
      case cudaLaunchAttributeClusterDimension:
        config.cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y,
                          attribute.val.clusterDim.z};
        break;
      case cudaLaunchAttributeCooperative:
        config.cooperative = attribute.val.cooperative != 0;
        break;
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributePriority:
      case cudaLaunchAttributeAccessPolicyWindow:
      case cudaLaunchAttributeSynchronizationPolicy:
      case cudaLaunchAttributeClusterSchedulingPolicyPreference:
      case cudaLaunchAttributePreferredSharedMemoryCarveout:
      // Launches run one after another here: a dependent launch only ever starts when its
      // predecessor is done.
      case cudaLaunchAttributeProgrammaticStreamSerialization: break;
      default:
        stop_unimplemented("cudaLaunchKernelExC",
                           "launch attribute " + std::to_string(int(attribute.id)));
    }
  }
  return config;
}

const Program& program_of(const HostKernel& kernel) {
  return kernel.module->module().kernel(kernel.name);
}

}  // namespace
}  // namespace fused_peft::sim

using namespace fused_peft::sim;

FUSED_PEFT_SIM_API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block,
                                                void** arguments, size_t shared, cudaStream_t) {
  LaunchConfig config;
  config.grid = dims(grid);
  config.block = dims(block);
  config.dynamic_shared = uint32_t(shared);
  return launch(function, std::move(config), arguments);
}

FUSED_PEFT_SIM_API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid,
                                                           dim3 block, void** arguments,
                                                           size_t shared, cudaStream_t) {
  LaunchConfig config;
  config.grid = dims(grid);
  config.block = dims(block);
  config.dynamic_shared = uint32_t(shared);
  config.cooperative = true;
  return launch(function, std::move(config), arguments);
}

FUSED_PEFT_SIM_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config,
                                                   const void* function, void** arguments) {
  return launch(function, read_config(*config), arguments);
}

FUSED_PEFT_SIM_API cudaError_t cudaFuncSetAttribute(const void* function,
                                                    cudaFuncAttribute attribute, int value) {
  return guarded([&] {
    HostKernel* kernel = find_kernel(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    switch (attribute) {
      case cudaFuncAttributeMaxDynamicSharedMemorySize: {
        const int limit = Process::get().device->shared_per_block_optin -
                          int(program_of(*kernel).static_shared_bytes);
        if (value < 0 || value > limit) return cudaErrorInvalidValue;
        kernel->max_dynamic_shared = value;
        return cudaSuccess;
      }
      case cudaFuncAttributeNonPortableClusterSizeAllowed:
        kernel->non_portable_cluster = value != 0;
        return cudaSuccess;
      case cudaFuncAttributePreferredSharedMemoryCarveout: return cudaSuccess;
      default:
        stop_unimplemented("cudaFuncSetAttribute", "attribute " + std::to_string(int(attribute)));
    }
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel,
                                                               cudaFuncAttribute attribute,
                                                               int value, int) {
  return cudaFuncSetAttribute(kernel, attribute, value);
}

FUSED_PEFT_SIM_API cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) {
  return cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes,
                                                     const void* function) {
  return guarded([&] {
    HostKernel* kernel = find_kernel(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    const Program& program = program_of(*kernel);
    *attributes = {};
    attributes->sharedSizeBytes = program.static_shared_bytes;
    attributes->localSizeBytes = program.local_bytes;
    const uint64_t required = uint64_t{program.max_threads[0]} *
                              std::max(program.max_threads[1], 1u) *
                              std::max(program.max_threads[2], 1u);
    attributes->maxThreadsPerBlock = required ? int(required) : 1024;
    attributes->numRegs = int(program.max_registers ? program.max_registers : 32);
    attributes->ptxVersion = int(program.target_sm);
    attributes->binaryVersion = Process::get().device->major * 10 + Process::get().device->minor;
    attributes->maxDynamicSharedSizeBytes = kernel->max_dynamic_shared;
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaFuncGetName(const char** name, const void* function) {
  const HostKernel* kernel = find_kernel(function);
  if (!kernel) return set_error(cudaErrorInvalidDeviceFunction);
  *name = kernel->name.c_str();
  return cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                                             const void* function,
                                                                             int threads,
                                                                             size_t shared) {
  return guarded([&] {
    const HostKernel* kernel = find_kernel(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    *blocks = blocks_per_sm(program_of(*kernel), uint64_t(threads), uint32_t(shared),
                            *Process::get().device);
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* function, int threads, size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

FUSED_PEFT_SIM_API cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                                              const cudaLaunchConfig_t* config) {
  return guarded([&] {
    const HostKernel* kernel = find_kernel(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    const LaunchConfig launch = read_config(*config);
    const DeviceModel& device = *Process::get().device;
    const int per_sm =
        blocks_per_sm(program_of(*kernel), launch.block.count(), launch.dynamic_shared, device);
    *clusters = int(uint64_t(per_sm) * uint64_t(device.num_sms) /
                    std::max<uint64_t>(launch.cluster.count(), 1));
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void* function,
                                                                    const cudaLaunchConfig_t*) {
  return guarded([&] {
    const HostKernel* kernel = find_kernel(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    const DeviceModel& device = *Process::get().device;
    *size = kernel->non_portable_cluster ? device.max_cluster_non_portable : device.max_cluster;
    return cudaSuccess;
  });
}
