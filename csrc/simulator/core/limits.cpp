// What fits: the checks that the CUDA runtime makes of a launch, and occupancy.
#include <algorithm>
#include <string>

#include "simulator/core/cta.h"

namespace fused_peft::sim {
namespace {

constexpr int kErrorInvalidValue = 1;
constexpr int kErrorInvalidConfiguration = 9;
constexpr int kErrorInvalidKernelImage = 209;  // cudaErrorNoKernelImageForDevice
constexpr int kErrorLaunchOutOfResources = 701;
constexpr int kErrorCooperativeLaunchTooLarge = 720;
constexpr int kErrorInvalidClusterSize = 912;

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxBlock[3] = {1024, 1024, 64};
constexpr uint32_t kMaxGrid[3] = {0x7fffffff, 65535, 65535};
// Registers are given out to warps in units of 256 (8 a thread), and a thread has at most 255.
constexpr uint32_t kRegisterUnit = 8;
constexpr uint32_t kMaxRegisters = 255;

std::string text_of(const Dim3& d) {
  std::string text = "(";
  text += std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  return text;
}

uint64_t shared_of(const Program& program, uint32_t dynamic_shared) {
  return uint64_t{program.static_shared_bytes} + dynamic_shared;
}

uint32_t rounded(uint32_t registers) {
  return (registers + kRegisterUnit - 1) / kRegisterUnit * kRegisterUnit;
}

struct Verdict {
  int error = 0;
  std::string why;
};

Verdict check_dimensions(const Program& program, const LaunchConfig& config) {
  const uint32_t grid[3] = {config.grid.x, config.grid.y, config.grid.z};
  const uint32_t block[3] = {config.block.x, config.block.y, config.block.z};
  for (int i = 0; i < 3; ++i) {
    if (grid[i] == 0 || grid[i] > kMaxGrid[i]) {
      return {kErrorInvalidConfiguration,
              "grid " + text_of(config.grid) + ": 1 to (2147483647, 65535, 65535)"};
    }
    if (block[i] == 0 || block[i] > kMaxBlock[i]) {
      return {kErrorInvalidConfiguration,
              "block " + text_of(config.block) + ": 1 to (1024, 1024, 64)"};
    }
  }
  const uint64_t threads = config.block.count();
  if (threads > kMaxThreads) {
    return {kErrorInvalidConfiguration, "block " + text_of(config.block) + " of " +
                                            std::to_string(threads) + " threads: at most 1024"};
  }
  const uint64_t bound = uint64_t{std::max(1u, program.max_threads[0])} *
                         std::max(1u, program.max_threads[1]) *
                         std::max(1u, program.max_threads[2]);
  if (program.max_threads[0] != 0 && threads > bound) {
    return {kErrorInvalidValue, "block of " + std::to_string(threads) +
                                    " threads: the kernel's launch bounds say at most " +
                                    std::to_string(bound)};
  }
  for (int i = 0; i < 3 && program.required_threads[0] != 0; ++i) {
    if (block[i] != std::max(1u, program.required_threads[i])) {
      return {kErrorInvalidValue, "block " + text_of(config.block) + ": the kernel requires (" +
                                      std::to_string(program.required_threads[0]) + ", " +
                                      std::to_string(program.required_threads[1]) + ", " +
                                      std::to_string(program.required_threads[2]) + ")"};
    }
  }
  return {};
}

Verdict check_resources(const Program& program, const LaunchConfig& config,
                        const DeviceModel& device) {
  const uint64_t shared = shared_of(program, config.dynamic_shared);
  if (shared > uint64_t(device.shared_per_block_optin)) {
    return {kErrorInvalidValue, std::to_string(shared) + " bytes of shared memory: the " +
                                    device.name + " has " +
                                    std::to_string(device.shared_per_block_optin) + " for a block"};
  }
  const uint64_t warps = (config.block.count() + kLanes - 1) / kLanes;
  const uint64_t registers = warps * kLanes * rounded(registers_per_thread(program));
  if (program.max_registers != 0 && registers > uint64_t(device.registers_per_sm)) {
    return {kErrorLaunchOutOfResources, std::to_string(registers) +
                                            " registers for a block: the SM has " +
                                            std::to_string(device.registers_per_sm)};
  }
  if (config.params.size() < program.param_bytes) {
    return {kErrorInvalidValue, std::to_string(config.params.size()) +
                                    " bytes of parameters: the kernel has " +
                                    std::to_string(program.param_bytes)};
  }
  return {};
}

Verdict check_target(const Program& program, const DeviceModel& device) {
  const uint32_t have = uint32_t(device.major * 10 + device.minor);
  const bool fits =
      program.target_arch_specific ? have == program.target_sm : have >= program.target_sm;
  if (fits) return {};
  return {kErrorInvalidKernelImage, "PTX for sm_" + std::to_string(program.target_sm) +
                                        (program.target_arch_specific ? "a" : "") + ": the " +
                                        device.name + " is sm_" + std::to_string(have)};
}

Verdict check_cluster(const Program& program, const LaunchConfig& config,
                      const DeviceModel& device) {
  const uint64_t size = config.cluster.count();
  const uint32_t* required = program.required_cluster;
  if (required[0] != 0 &&
      (config.cluster.x != required[0] || config.cluster.y != std::max(1u, required[1]) ||
       config.cluster.z != std::max(1u, required[2]))) {
    return {kErrorInvalidClusterSize, "cluster " + text_of(config.cluster) +
                                          ": the kernel requires (" + std::to_string(required[0]) +
                                          ", " + std::to_string(required[1]) + ", " +
                                          std::to_string(required[2]) + ")"};
  }
  if (size == 1) return {};
  if (size == 0 || device.max_cluster == 0 || size > uint64_t(device.max_cluster_non_portable)) {
    return {kErrorInvalidClusterSize,
            "cluster " + text_of(config.cluster) + ": the " + device.name + " has at most " +
                std::to_string(device.max_cluster_non_portable) + " blocks in one"};
  }
  if (config.grid.x % config.cluster.x || config.grid.y % config.cluster.y ||
      config.grid.z % config.cluster.z) {
    return {kErrorInvalidConfiguration, "grid " + text_of(config.grid) +
                                            " is no multiple of the cluster " +
                                            text_of(config.cluster)};
  }
  if (max_active_clusters(program, config, device) == 0) {
    return {kErrorInvalidClusterSize,
            "no cluster " + text_of(config.cluster) + " of this kernel fits"};
  }
  return {};
}

Verdict check_cooperative(const Program& program, const LaunchConfig& config,
                          const DeviceModel& device) {
  if (!config.cooperative) return {};
  const uint64_t resident =
      uint64_t(blocks_per_sm(program, config.block.count(), config.dynamic_shared, device)) *
      uint64_t(device.num_sms);
  if (config.grid.count() <= resident) return {};
  return {kErrorCooperativeLaunchTooLarge,
          "a cooperative grid of " + std::to_string(config.grid.count()) +
              " blocks: " + std::to_string(resident) + " are resident at a time"};
}

}  // namespace

uint32_t registers_per_thread(const Program& program) {
  if (program.max_registers != 0) return std::min(program.max_registers, kMaxRegisters);
  return 0;
}

int blocks_per_sm(const Program& program, uint64_t block_threads, uint32_t dynamic_shared,
                  const DeviceModel& device) {
  const uint64_t warps = (block_threads + kLanes - 1) / kLanes;
  if (warps == 0) return 0;
  uint64_t blocks = std::min<uint64_t>(uint64_t(device.blocks_per_sm),
                                       uint64_t(device.threads_per_sm) / (warps * kLanes));
  // Shared memory is given out in units of 128 bytes.
  const uint64_t shared =
      (shared_of(program, dynamic_shared) + uint64_t(device.shared_reserved) + 127) / 128 * 128;
  blocks = std::min<uint64_t>(blocks, uint64_t(device.shared_per_sm) / shared);
  if (const uint32_t registers = rounded(registers_per_thread(program))) {
    blocks = std::min<uint64_t>(blocks,
                                uint64_t(device.registers_per_sm) / (warps * kLanes * registers));
  }
  return int(blocks);
}

int max_active_clusters(const Program& program, const LaunchConfig& config,
                        const DeviceModel& device) {
  const int size = int(config.cluster.count());
  if (size < 1) return 0;
  // A cluster lies in one GPC of at most this many SMs (H100: 16 or 18).
  constexpr int kSmsOfGpc = 16;
  const int per_sm = blocks_per_sm(program, config.block.count(), config.dynamic_shared, device);
  const int whole_gpcs = device.num_sms / kSmsOfGpc, rest = device.num_sms % kSmsOfGpc;
  return whole_gpcs * (kSmsOfGpc * per_sm / size) + rest * per_sm / size;
}

int validate_launch(const Program& program, const LaunchConfig& config, const DeviceModel& device,
                    std::string* why) {
  const auto verdict = [&]() -> Verdict {
    if (Verdict v = check_target(program, device); v.error) return v;
    if (Verdict v = check_dimensions(program, config); v.error) return v;
    if (Verdict v = check_resources(program, config, device); v.error) return v;
    if (Verdict v = check_cluster(program, config, device); v.error) return v;
    return check_cooperative(program, config, device);
  }();
  *why = verdict.why;
  return verdict.error;
}

}  // namespace fused_peft::sim
