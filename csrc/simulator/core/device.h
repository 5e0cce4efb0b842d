// The GPUs a launch can be checked against.
#pragma once

#include <cstdint>
#include <string>

namespace fused_peft::sim {

// Per-device limits; bytes and threads as cudaDeviceProp has them.
struct DeviceModel {
  std::string key;   // "a100"
  std::string name;  // "NVIDIA A100-SXM4-80GB"
  int major = 0, minor = 0;
  int num_sms = 0;
  int shared_per_block = 48 * 1024;
  int shared_per_block_optin = 0;
  int shared_per_sm = 0;
  int shared_reserved = 1024;  // per block
  int registers_per_sm = 65536;
  int threads_per_sm = 2048;
  int blocks_per_sm = 32;
  int max_cluster = 0;  // portable cluster size; 0: none
  int max_cluster_non_portable = 0;
  int64_t global_bytes = 0;
  int64_t l2_bytes = 0;
  int memory_clock_khz = 0;
  int memory_bus_bits = 0;
  int clock_khz = 0;
};

// nullptr where the key is none of a100, rtx4090, h100, h200.
const DeviceModel* find_device(const std::string& key);

}  // namespace fused_peft::sim
