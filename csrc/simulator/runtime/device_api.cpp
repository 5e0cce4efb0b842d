// The device's properties, errors, streams and events.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simulator/runtime/api.h"

namespace fused_peft::sim {
namespace {
thread_local int last_error = 0;

// The larger of what fits: CUDA's own limits, the same on every device modelled here.
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kMaxGrid[3] = {0x7fffffff, 65535, 65535};
constexpr int kMaxBlock[3] = {1024, 1024, 64};

// What programs are told: with options.max_sms the device has no more of them.
int num_sms(const DeviceModel& model) {
  const int most = int(Process::get().options.max_sms);
  return most == 0 ? model.num_sms : std::min(model.num_sms, most);
}
}  // namespace

cudaError_t set_error(int error, const std::string& message) {
  if (error) last_error = error;
  if (!message.empty()) {
    Process::get().last_message = message;
    std::fprintf(stderr, "simulator: %s\n", message.c_str());
  }
  return cudaError_t(error);
}

void stop_unimplemented(const char* call, const std::string& detail) {
  std::fprintf(stderr, "simulator: %s: %s is not implemented\n", call, detail.c_str());
  std::exit(3);
}

}  // namespace fused_peft::sim

using namespace fused_peft::sim;

FUSED_PEFT_SIM_API cudaError_t cudaGetLastError() {
  const int sticky = Process::get().sticky_error;
  const int error = sticky ? sticky : last_error;
  last_error = 0;
  return cudaError_t(error);
}
FUSED_PEFT_SIM_API cudaError_t cudaPeekAtLastError() {
  const int sticky = Process::get().sticky_error;
  return cudaError_t(sticky ? sticky : last_error);
}

FUSED_PEFT_SIM_API cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
FUSED_PEFT_SIM_API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
FUSED_PEFT_SIM_API cudaError_t cudaSetDevice(int device) {
  return set_error(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
FUSED_PEFT_SIM_API cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return cudaSetDevice(device);
}
FUSED_PEFT_SIM_API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
FUSED_PEFT_SIM_API cudaError_t cudaDeviceSynchronize() {
  return set_error(Process::get().sticky_error);
}
FUSED_PEFT_SIM_API cudaError_t cudaDeviceReset() { return cudaSuccess; }
FUSED_PEFT_SIM_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return set_error(cudaErrorInvalidDevice);
  const DeviceModel& model = *Process::get().device;
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "%s (simulated)", model.name.c_str());
  properties->totalGlobalMem = size_t(model.global_bytes);
  properties->sharedMemPerBlock = size_t(model.shared_per_block);
  properties->regsPerBlock = model.registers_per_sm;
  properties->warpSize = kLanes;
  properties->memPitch = 0x7fffffff;
  properties->maxThreadsPerBlock = kMaxThreadsPerBlock;
  std::memcpy(properties->maxThreadsDim, kMaxBlock, sizeof kMaxBlock);
  std::memcpy(properties->maxGridSize, kMaxGrid, sizeof kMaxGrid);
  properties->totalConstMem = 65536;
  properties->major = model.major;
  properties->minor = model.minor;
  properties->textureAlignment = 512;
  properties->multiProcessorCount = num_sms(model);
  properties->canMapHostMemory = 1;
  properties->concurrentKernels = 1;
  properties->unifiedAddressing = 1;
  properties->memoryBusWidth = model.memory_bus_bits;
  properties->l2CacheSize = int(model.l2_bytes);
  properties->maxThreadsPerMultiProcessor = model.threads_per_sm;
  properties->sharedMemPerMultiprocessor = size_t(model.shared_per_sm);
  properties->regsPerMultiprocessor = model.registers_per_sm;
  properties->managedMemory = 1;
  properties->cooperativeLaunch = 1;
  properties->sharedMemPerBlockOptin = size_t(model.shared_per_block_optin);
  properties->maxBlocksPerMultiProcessor = model.blocks_per_sm;
  properties->reservedSharedMemPerBlock = size_t(model.shared_reserved);
  properties->clusterLaunch = model.max_cluster > 0;
  return cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                                      int device) {
  if (device != 0) return set_error(cudaErrorInvalidDevice);
  const DeviceModel& model = *Process::get().device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = kMaxBlock[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = kMaxBlock[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = kMaxBlock[2]; break;
    case cudaDevAttrMaxGridDimX: *value = kMaxGrid[0]; break;
    case cudaDevAttrMaxGridDimY: *value = kMaxGrid[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = kMaxGrid[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = model.shared_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = model.shared_per_block_optin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = model.shared_per_sm; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = model.shared_reserved; break;
    case cudaDevAttrTotalConstantMemory: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = kLanes; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = model.registers_per_sm; break;
    case cudaDevAttrClockRate: *value = model.clock_khz; break;
    case cudaDevAttrMemoryClockRate: *value = model.memory_clock_khz; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = model.memory_bus_bits; break;
    case cudaDevAttrMultiProcessorCount: *value = num_sms(model); break;
    case cudaDevAttrL2CacheSize: *value = int(model.l2_bytes); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = model.threads_per_sm; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = model.blocks_per_sm; break;
    case cudaDevAttrComputeCapabilityMajor: *value = model.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = model.minor; break;
    case cudaDevAttrClusterLaunch: *value = model.max_cluster > 0; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCanMapHostMemory: *value = 1; break;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrIntegrated: *value = 0; break;
    default:
      stop_unimplemented("cudaDeviceGetAttribute", "attribute " + std::to_string(int(attribute)));
  }
  return cudaSuccess;
}

// ---- streams and events: everything is done when the call returns

FUSED_PEFT_SIM_API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
FUSED_PEFT_SIM_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}
FUSED_PEFT_SIM_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaDeviceSynchronize();
}
FUSED_PEFT_SIM_API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaDeviceSynchronize(); }
FUSED_PEFT_SIM_API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  return *priority = 0, cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaStreamIsCapturing(cudaStream_t,
                                                     cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

namespace {
using Clock = std::chrono::steady_clock;
}

FUSED_PEFT_SIM_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Clock::time_point(Clock::now()));
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}
FUSED_PEFT_SIM_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Clock::time_point*>(event);
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *reinterpret_cast<Clock::time_point*>(event) = Clock::now();
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaEventQuery(cudaEvent_t) { return cudaDeviceSynchronize(); }
FUSED_PEFT_SIM_API cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }
// The simulator's own time: says nothing about a GPU's.
FUSED_PEFT_SIM_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start,
                                                    cudaEvent_t end) {
  const auto span =
      *reinterpret_cast<Clock::time_point*>(end) - *reinterpret_cast<Clock::time_point*>(start);
  *milliseconds = std::chrono::duration<float, std::milli>(span).count();
  return cudaSuccess;
}
