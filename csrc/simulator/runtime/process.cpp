#include "simulator/runtime/process.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "simulator/core/errors.h"
#include "simulator/runtime/launch_rules.h"

namespace fused_peft::sim {
namespace {

constexpr int kErrorIllegalAddress = 700;
constexpr int kErrorNoKernelImage = 209;
constexpr int kErrorInvalidPtx = 218;
constexpr int kErrorLaunchFailure = 719;

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? value : nullptr;
}

void read_checks(Options& options, const std::string& list) {
  options.memcheck = options.initcheck = options.racecheck = options.synccheck = false;
  for (size_t at = 0; at <= list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    const std::string word = list.substr(at, comma - at);
    if (word == "memcheck")
      options.memcheck = true;
    else if (word == "initcheck")
      options.initcheck = true;
    else if (word == "racecheck")
      options.racecheck = true;
    else if (word == "synccheck")
      options.synccheck = true;
    else if (word == "all")
      options.memcheck = options.initcheck = options.racecheck = options.synccheck = true;
    else if (!word.empty() && word != "none")
      throw std::runtime_error("FUSED_PEFT_SIMULATOR_CHECKS: '" + word +
                               "' is none of memcheck, initcheck, racecheck, synccheck, all, none");
    at = comma + 1;
  }
}

void report_at_exit() {
  Process& process = Process::get();
  if (process.report_path.empty()) return;
  std::ofstream(process.report_path) << report_json(process);
}

}  // namespace

Module& LoadedModule::module() {
  if (!error_.empty()) throw Unsupported(error_);
  const DeviceModel& device = *Process::get().device;
  const PtxImage& image = choose_image(images_, device.major * 10 + device.minor);
  std::unique_ptr<Module>& module = modules_[&image];
  if (!module) module = Module::parse(image.text);
  return *module;
}

Process& Process::get() {
  // Never destroyed: host destructors (__cudaUnregisterFatBinary, at-exit handlers) may still call
  // in.
  static Process* process = new Process;
  return *process;
}

Process::Process() {
  const char* key = environment("FUSED_PEFT_SIMULATOR_DEVICE");
  device = find_device(key ? key : "h100");
  if (!device) {
    std::fprintf(stderr, "FUSED_PEFT_SIMULATOR_DEVICE: '%s' is none of a100, rtx4090, h100, h200\n",
                 key);
    std::exit(2);
  }
  if (const char* seed = environment("FUSED_PEFT_SIMULATOR_SEED"))
    options.seed = std::strtoull(seed, nullptr, 0);
  if (const char* threads = environment("FUSED_PEFT_SIMULATOR_THREADS"))
    options.threads = uint32_t(std::strtoul(threads, nullptr, 0));
  if (const char* sms = environment("FUSED_PEFT_SIMULATOR_SMS"))
    options.max_sms = uint32_t(std::strtoul(sms, nullptr, 0));
  try {
    if (const char* checks = environment("FUSED_PEFT_SIMULATOR_CHECKS"))
      read_checks(options, checks);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    std::exit(2);
  }
  if (const char* path = environment("FUSED_PEFT_SIMULATOR_REPORT")) {
    report_path = path;
    std::atexit(report_at_exit);
  }
}

AlignedBytes pack_params(const Program& program, void** arguments) {
  AlignedBytes params(program.param_bytes);
  for (size_t i = 0; i < program.params.size(); ++i)
    std::memcpy(params.data() + program.params[i].offset, arguments[i], program.params[i].bytes);
  return params;
}

int execute(HostKernel& kernel, LaunchConfig config) {
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  if (process.sticky_error) return process.sticky_error;
  const auto fail = [&](int code, const std::string& words, bool sticky) {
    process.last_message = words;
    if (sticky) process.sticky_error = code;
    std::fprintf(stderr, "simulator: %s\n", words.c_str());
    return code;
  };
  try {
    const Program& program = kernel.module->module().kernel(kernel.name);
    std::string why;
    if (const int code = check_launch(kernel, program, config, *process.device, &why))
      return fail(code, kernel.name + ": " + why, false);
    Launch launch;
    launch.program = &program;
    launch.config = std::move(config);
    launch.device = process.device;
    launch.options = process.options;
    launch.number = process.launches++;
    launch.executed.assign(program.code.size(), 0);
    launch.executed_lanes.assign(program.code.size(), 0);
    Checker checker(launch);
    launch.checker = &checker;
    const auto begin = std::chrono::steady_clock::now();
    int code = 0;
    std::string words;
    try {
      run_launch(launch);
    } catch (const LaunchFailure& failure) {
      code = failure.error_code;
      words = failure.what();
    }
    Counters counters = checker.counters();
    counters.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    process.counters.push_back(std::move(counters));
    std::fwrite(launch.output.data(), 1, launch.output.size(), stdout);
    std::fflush(stdout);
    process.findings.insert(process.findings.end(), checker.findings().begin(),
                            checker.findings().end());
    process.total_findings += checker.total_findings();
    for (const Finding& finding : checker.findings()) {
      std::fprintf(stderr, "simulator: %s\n", finding.text.c_str());
      const bool faults =
          finding.kind == FindingKind::kOutOfBounds || finding.kind == FindingKind::kMisaligned;
      if (faults && !code) code = kErrorIllegalAddress, words = finding.text;
    }
    return code ? fail(code, words, true) : 0;
  } catch (const Unsupported& error) {
    return fail(kErrorNoKernelImage, error.what(), true);
  } catch (const SyntaxError& error) {
    return fail(kErrorInvalidPtx, error.what(), true);
  } catch (const std::exception& error) {
    return fail(kErrorLaunchFailure, kernel.name + ": " + error.what(), true);
  }
}

}  // namespace fused_peft::sim
