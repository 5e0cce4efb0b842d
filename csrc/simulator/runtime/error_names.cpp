// cudaGetErrorName and cudaGetErrorString for the errors that the simulator can return.
#include "simulator/runtime/api.h"

namespace {

struct ErrorText {
  cudaError_t code;
  const char *name, *text;
};

#define FUSED_PEFT_ERROR(code, text) {code, #code, text}
constexpr ErrorText kErrors[] = {
    FUSED_PEFT_ERROR(cudaSuccess, "no error"),
    FUSED_PEFT_ERROR(cudaErrorInvalidValue, "invalid argument"),
    FUSED_PEFT_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    FUSED_PEFT_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    FUSED_PEFT_ERROR(cudaErrorInvalidSymbol, "invalid device symbol"),
    FUSED_PEFT_ERROR(cudaErrorMissingConfiguration, "__global__ function call is not configured"),
    FUSED_PEFT_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    FUSED_PEFT_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    FUSED_PEFT_ERROR(cudaErrorInvalidKernelImage, "device kernel image is invalid"),
    FUSED_PEFT_ERROR(cudaErrorNoKernelImageForDevice,
                     "no kernel image is available for execution on the device"),
    FUSED_PEFT_ERROR(cudaErrorInvalidPtx, "a PTX JIT compilation failed"),
    FUSED_PEFT_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    FUSED_PEFT_ERROR(cudaErrorSymbolNotFound, "named symbol not found"),
    FUSED_PEFT_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    FUSED_PEFT_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    FUSED_PEFT_ERROR(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    FUSED_PEFT_ERROR(cudaErrorAssert, "device-side assert triggered"),
    FUSED_PEFT_ERROR(cudaErrorHostMemoryNotRegistered,
                     "pointer does not correspond to a registered memory region"),
    FUSED_PEFT_ERROR(cudaErrorHardwareStackError, "hardware stack error"),
    FUSED_PEFT_ERROR(cudaErrorIllegalInstruction, "an illegal instruction was encountered"),
    FUSED_PEFT_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    FUSED_PEFT_ERROR(cudaErrorInvalidAddressSpace,
                     "operation not supported on global/shared address space"),
    FUSED_PEFT_ERROR(cudaErrorInvalidPc, "invalid program counter"),
    FUSED_PEFT_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    FUSED_PEFT_ERROR(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    FUSED_PEFT_ERROR(cudaErrorNotSupported, "operation not supported"),
    FUSED_PEFT_ERROR(cudaErrorInvalidClusterSize, "cluster size is not valid"),
    FUSED_PEFT_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef FUSED_PEFT_ERROR

const ErrorText* find(cudaError_t code) {
  for (const ErrorText& error : kErrors)
    if (error.code == code) return &error;
  return nullptr;
}

}  // namespace

FUSED_PEFT_SIM_API const char* cudaGetErrorName(cudaError_t code) {
  const ErrorText* error = find(code);
  return error ? error->name : "unrecognized error code";
}

FUSED_PEFT_SIM_API const char* cudaGetErrorString(cudaError_t code) {
  const ErrorText* error = find(code);
  return error ? error->text : "unrecognized error code";
}
