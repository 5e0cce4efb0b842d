// Figures of the CUDA C++ programming guide's table of compute capabilities and NVIDIA's data
// sheets.
#include "simulator/core/device.h"

namespace fused_peft::sim {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;
constexpr int64_t kMiB = int64_t{1} << 20;

// H100 and H200 are one chip with different memories.
DeviceModel hopper(const char* key, const char* name, int64_t gib, int64_t l2_mib,
                   int memory_clock_khz, int memory_bus_bits) {
  return {.key = key,
          .name = name,
          .major = 9,
          .minor = 0,
          .num_sms = 132,
          .shared_per_block_optin = 227 * 1024,
          .shared_per_sm = 228 * 1024,
          .max_cluster = 8,
          .max_cluster_non_portable = 16,
          .global_bytes = gib * kGiB,
          .l2_bytes = l2_mib * kMiB,
          .memory_clock_khz = memory_clock_khz,
          .memory_bus_bits = memory_bus_bits,
          .clock_khz = 1980000};
}

const DeviceModel kDevices[] = {
    {.key = "a100",
     .name = "NVIDIA A100-SXM4-80GB",
     .major = 8,
     .minor = 0,
     .num_sms = 108,
     .shared_per_block_optin = 163 * 1024,
     .shared_per_sm = 164 * 1024,
     .global_bytes = 80 * kGiB,
     .l2_bytes = 40 * kMiB,
     .memory_clock_khz = 1593000,
     .memory_bus_bits = 5120,
     .clock_khz = 1410000},
    {.key = "rtx4090",
     .name = "NVIDIA GeForce RTX 4090",
     .major = 8,
     .minor = 9,
     .num_sms = 128,
     .shared_per_block_optin = 99 * 1024,
     .shared_per_sm = 100 * 1024,
     .threads_per_sm = 1536,
     .blocks_per_sm = 24,
     .global_bytes = 24 * kGiB,
     .l2_bytes = 72 * kMiB,
     .memory_clock_khz = 10501000,
     .memory_bus_bits = 384,
     .clock_khz = 2520000},
    hopper("h100", "NVIDIA H100 80GB HBM3", 80, 50, 2619000, 5120),
    hopper("h200", "NVIDIA H200", 141, 60, 3201000, 6144),
};

}  // namespace

const DeviceModel* find_device(const std::string& key) {
  for (const DeviceModel& device : kDevices) {
    if (device.key == key) return &device;
  }
  return nullptr;
}

}  // namespace fused_peft::sim
