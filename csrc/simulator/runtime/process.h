// What a process that uses the simulator shares: the device it pretends to have, options, loaded
// modules, results.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "simulator/check/checker.h"
#include "simulator/check/counters.h"
#include "simulator/core/cta.h"
#include "simulator/ptx/module.h"
#include "simulator/runtime/fat_binary.h"

namespace fused_peft::sim {

// A PTX text or fat binary; an image is parsed when a device first needs it.
class LoadedModule {
 public:
  explicit LoadedModule(std::vector<PtxImage> images, std::shared_ptr<std::string> text = nullptr)
      : images_(std::move(images)), text_(std::move(text)) {}
  Module& module();  // throws SyntaxError, Unsupported
  // What module() is to say: the images could not be read.
  void set_error(std::string words) { error_ = std::move(words); }

 private:
  std::vector<PtxImage> images_;
  std::shared_ptr<std::string>
      text_;  // keeps the text alive where the caller's does not outlive the call
  std::unordered_map<const PtxImage*, std::unique_ptr<Module>> modules_;
  std::string error_;
};

// A kernel as the host knows it: what cudaKernel_t and a host function's address stand for.
struct HostKernel {
  std::shared_ptr<LoadedModule> module;
  std::string name;
  int max_dynamic_shared = 48 * 1024;  // cudaFuncAttributeMaxDynamicSharedMemorySize
  bool non_portable_cluster = false;
};

struct HostVariable {
  std::shared_ptr<LoadedModule> module;
  std::string name;
  uint64_t bytes = 0;
};

class Process {
 public:
  static Process& get();

  std::recursive_mutex mutex;
  const DeviceModel* device;
  Options options;
  std::unordered_map<const void*, std::unique_ptr<HostKernel>> kernels;  // by host function
  std::unordered_map<const void*, HostVariable> variables;               // by host address
  int sticky_error = 0;            // cudaError_t that every later call returns
  std::string last_message;        // the words behind the last error
  std::vector<Counters> counters;  // of each launch since the last reset
  std::vector<Finding> findings;
  uint64_t total_findings = 0;
  uint64_t launches = 0;
  std::string report_path;  // FUSED_PEFT_SIMULATOR_REPORT: JSON of counters and findings, at exit

 private:
  Process();
};

// Runs a kernel to its end. Returns a cudaError_t; the words go to Process::last_message (and to
// stderr, for a program that runs unmodified).
int execute(HostKernel& kernel, LaunchConfig config);
// Copies the arguments' bytes into the layout that the kernel's parameters have.
AlignedBytes pack_params(const Program& program, void** arguments);

// Counters and findings as JSON.
std::string report_json(const Process& process);

}  // namespace fused_peft::sim
