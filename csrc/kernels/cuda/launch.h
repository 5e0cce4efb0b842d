// Launching a kernel: dynamic shared memory beyond 48 KiB, programmatic dependent launch on sm_90,
// the error as a Status.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common.h"
#include "kernels/cuda/device.h"

namespace fused_peft::cuda {

// dependent: may start while the kernel before it in the stream drains (it then waits with
// griddepcontrol.wait). cluster: CTAs in one (sm_90).
template <class... Params>
Status launch_clusters(void (*kernel)(Params...), dim3 grid, int cluster, int threads,
                       int shared_bytes, const LaunchContext& context, bool dependent,
                       const Params&... params) {
  if (shared_bytes > 48 * 1024 && cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       shared_bytes) != cudaSuccess)
    return Status::kLaunchFailed;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(context.stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (dependent && context.device.major >= 9) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params...);
  return error == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <class... Params>
Status launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
              const LaunchContext& context, bool dependent, const Params&... params) {
  return launch_clusters(kernel, grid, 1, threads, shared_bytes, context, dependent, params...);
}

}  // namespace fused_peft::cuda
