// What the files that export the CUDA runtime's symbols share. Types come from the toolkit's
// headers; nothing of it is linked.
#pragma once

#include <cuda_runtime_api.h>

#include "simulator/runtime/process.h"

#define FUSED_PEFT_SIM_API extern "C" __attribute__((visibility("default")))

namespace fused_peft::sim {

// The kernel of a host function or of a cudaKernel_t handle; nullptr if neither is known.
HostKernel* find_kernel(const void* function);
// Remembers the error for cudaGetLastError and returns it. Success leaves an older error in place.
cudaError_t set_error(int error, const std::string& message = {});
// Runs a runtime call's body: a sticky error or a thrown Unsupported becomes the call's own error.
template <class Body>
cudaError_t guarded(Body&& body) {
  Process& process = Process::get();
  if (process.sticky_error) return set_error(process.sticky_error);
  try {
    return set_error(body());
  } catch (const std::exception& error) {
    return set_error(cudaErrorNotSupported, error.what());
  }
}
// The program called something that the simulator does not have: says so and stops the process.
[[noreturn]] void stop_unimplemented(const char* call, const std::string& detail);

}  // namespace fused_peft::sim
