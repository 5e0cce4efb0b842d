// What the runtime checks of a launch before the device sees it.
#pragma once

#include <string>

#include "simulator/runtime/process.h"

namespace fused_peft::sim {

// 0, or the cudaError_t that the runtime would return, with the reason in words.
int check_launch(const HostKernel& kernel, const Program& program, const LaunchConfig& config,
                 const DeviceModel& device, std::string* why);

}  // namespace fused_peft::sim
