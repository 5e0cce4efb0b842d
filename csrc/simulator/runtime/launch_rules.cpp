#include "simulator/runtime/launch_rules.h"

namespace fused_peft::sim {

int check_launch(const HostKernel& kernel, const Program& program, const LaunchConfig& config,
                 const DeviceModel& device, std::string* why) {
  constexpr int kErrorInvalidValue = 1;
  if (config.dynamic_shared > uint32_t(kernel.max_dynamic_shared)) {
    *why = std::to_string(config.dynamic_shared) +
           " bytes of dynamic shared memory are more than the " +
           std::to_string(kernel.max_dynamic_shared) +
           " that cudaFuncSetAttribute(MaxDynamicSharedMemorySize) allows this kernel";
    return kErrorInvalidValue;
  }
  const uint64_t cluster = config.cluster.count();
  if (cluster > uint64_t(device.max_cluster) && cluster > 1 && !kernel.non_portable_cluster) {
    *why = "a cluster of " + std::to_string(cluster) + " CTAs is above the portable size " +
           std::to_string(device.max_cluster) + " of " + device.name;
    return 912;  // cudaErrorInvalidClusterSize
  }
  return validate_launch(program, config, device, why);
}

}  // namespace fused_peft::sim
