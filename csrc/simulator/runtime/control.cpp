// What the Python side calls (through ctypes): modules, launches on host arrays, device, options,
// results.
#include <cstring>
#include <map>

#include "simulator/runtime/api.h"
#include "simulator/runtime/launch_rules.h"

namespace fused_peft::sim {
namespace {

thread_local std::string returned_text;  // holds what the last call handed out

struct PythonModule {
  std::shared_ptr<LoadedModule> module;
  std::map<std::string, std::unique_ptr<HostKernel>> kernels;
};

const char* give(std::string text) {
  returned_text = std::move(text);
  return returned_text.c_str();
}

}  // namespace
}  // namespace fused_peft::sim

using namespace fused_peft::sim;

// A module of the PTX text, or nullptr: then fused_peft_sim_message() says why.
FUSED_PEFT_SIM_API void* fused_peft_sim_load(const char* ptx) {
  try {
    auto text = std::make_shared<std::string>(ptx);
    auto module = std::make_unique<PythonModule>();
    module->module = std::make_shared<LoadedModule>(read_fat_binary(text->c_str()), text);
    module->module->module();
    return module.release();
  } catch (const std::exception& error) {
    Process::get().last_message = error.what();
    return nullptr;
  }
}

FUSED_PEFT_SIM_API void fused_peft_sim_unload(void* module) {
  delete static_cast<PythonModule*>(module);
}

// The kernels' names, one a line.
FUSED_PEFT_SIM_API const char* fused_peft_sim_kernels(void* module) {
  std::string names;
  for (const std::string& name : static_cast<PythonModule*>(module)->module->module().kernels())
    names += name + "\n";
  return give(names);
}

// The kernel's parameter sizes in bytes, one a line ("name bytes"); nullptr if it cannot be
// decoded.
FUSED_PEFT_SIM_API const char* fused_peft_sim_params(void* module, const char* kernel) {
  try {
    std::string lines;
    const Program& program = static_cast<PythonModule*>(module)->module->module().kernel(kernel);
    for (const KernelParam& param : program.params)
      lines += param.name + " " + std::to_string(param.bytes) + "\n";
    return give(lines);
  } catch (const std::exception& error) {
    Process::get().last_message = error.what();
    return nullptr;
  }
}

// dims: grid, block, cluster, three each. arguments: one address per parameter. Returns a
// cudaError_t.
FUSED_PEFT_SIM_API int fused_peft_sim_launch(void* handle, const char* name, const uint32_t* dims,
                                             uint32_t dynamic_shared, int cooperative,
                                             void** arguments) {
  auto& module = *static_cast<PythonModule*>(handle);
  std::unique_ptr<HostKernel>& kernel = module.kernels[name];
  if (!kernel) {
    kernel = std::make_unique<HostKernel>();
    kernel->module = module.module;
    kernel->name = name;
    kernel->max_dynamic_shared = Process::get().device->shared_per_block_optin;
    kernel->non_portable_cluster = true;
  }
  LaunchConfig config;
  config.grid = {dims[0], dims[1], dims[2]};
  config.block = {dims[3], dims[4], dims[5]};
  config.cluster = {dims[6], dims[7], dims[8]};
  config.dynamic_shared = dynamic_shared;
  config.cooperative = cooperative != 0;
  try {
    config.params = pack_params(module.module->module().kernel(name), arguments);
  } catch (const std::exception& error) {
    Process::get().last_message = error.what();
    return cudaErrorNoKernelImageForDevice;
  }
  const int code = execute(*kernel, std::move(config));
  Process::get().sticky_error = 0;  // each launch from Python stands for itself
  return code;
}

FUSED_PEFT_SIM_API void fused_peft_sim_register(const void* address, uint64_t bytes,
                                                int initialised, const char* name) {
  MemoryMap::global().add(address, bytes, initialised != 0, name);
}
FUSED_PEFT_SIM_API int fused_peft_sim_unregister(const void* address) {
  return MemoryMap::global().remove(address);
}

FUSED_PEFT_SIM_API const char* fused_peft_sim_message() {
  return give(Process::get().last_message);
}
FUSED_PEFT_SIM_API const char* fused_peft_sim_report() { return give(report_json(Process::get())); }
FUSED_PEFT_SIM_API void fused_peft_sim_reset() {
  Process& process = Process::get();
  process.counters.clear();
  process.findings.clear();
  process.total_findings = 0;
  process.sticky_error = 0;
  process.last_message.clear();
}

// 0: no such device.
FUSED_PEFT_SIM_API int fused_peft_sim_use_device(const char* key) {
  const DeviceModel* device = find_device(key);
  if (device) Process::get().device = device;
  return device != nullptr;
}
FUSED_PEFT_SIM_API const char* fused_peft_sim_device() { return give(Process::get().device->key); }

struct PythonOptions {
  uint64_t seed, hang_budget;
  uint32_t async_timing, max_sms, max_findings, threads;
  uint8_t memcheck, initcheck, racecheck, synccheck;
};

FUSED_PEFT_SIM_API void fused_peft_sim_get_options(PythonOptions* out) {
  const Options& in = Process::get().options;
  *out = {in.seed,     in.hang_budget,  uint32_t(in.async_timing),
          in.max_sms,  in.max_findings, in.threads,
          in.memcheck, in.initcheck,    in.racecheck,
          in.synccheck};
}
FUSED_PEFT_SIM_API void fused_peft_sim_set_options(const PythonOptions* in) {
  Options& out = Process::get().options;
  out.seed = in->seed;
  out.hang_budget = in->hang_budget;
  out.async_timing = AsyncTiming(in->async_timing);
  out.max_sms = in->max_sms;
  out.max_findings = in->max_findings;
  out.threads = in->threads;
  out.memcheck = in->memcheck;
  out.initcheck = in->initcheck;
  out.racecheck = in->racecheck;
  out.synccheck = in->synccheck;
}
