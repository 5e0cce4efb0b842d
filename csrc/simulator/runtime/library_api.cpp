// cudaLibrary*: PTX text or a fat binary from memory or a file, and the kernels in it.
#include <fstream>
#include <map>
#include <sstream>

#include "simulator/runtime/api.h"

namespace fused_peft::sim {
namespace {

struct Library {
  std::shared_ptr<LoadedModule> module;
  std::map<std::string, HostKernel*> kernels;  // handed out; owned by Process::kernels
};

Library* library_of(cudaLibrary_t handle) { return reinterpret_cast<Library*>(handle); }

HostKernel* kernel_of(Library& library, const std::string& name) {
  const auto found = library.kernels.find(name);
  if (found != library.kernels.end()) return found->second;
  if (!library.module->module().has_kernel(name)) return nullptr;
  auto kernel = std::make_unique<HostKernel>();
  kernel->module = library.module;
  kernel->name = name;
  HostKernel* handle = kernel.get();
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  process.kernels[handle] = std::move(kernel);
  return library.kernels[name] = handle;
}

}  // namespace
}  // namespace fused_peft::sim

using namespace fused_peft::sim;

FUSED_PEFT_SIM_API cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code,
                                                   cudaJitOption*, void**, unsigned,
                                                   cudaLibraryOption*, void**, unsigned) {
  return guarded([&] {
    // The caller's text need not outlive the call.
    std::vector<PtxImage> images = read_fat_binary(code);
    auto text = std::make_shared<std::string>();
    for (const PtxImage& image : images) text->append(image.text);
    size_t at = 0;
    for (PtxImage& image : images) {
      const size_t size = image.text.size();
      image.text = std::string_view(*text).substr(at, size);
      at += size;
    }
    auto* loaded = new Library{std::make_shared<LoadedModule>(std::move(images), text), {}};
    try {
      loaded->module->module();
    } catch (...) {
      delete loaded;
      throw;
    }
    *library = reinterpret_cast<cudaLibrary_t>(loaded);
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaLibraryLoadFromFile(
    cudaLibrary_t* library, const char* path, cudaJitOption* options, void** values, unsigned count,
    cudaLibraryOption* library_options, void** library_values, unsigned library_count) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return set_error(cudaErrorFileNotFound, std::string("cannot read ") + path);
  std::stringstream content;
  content << file.rdbuf();
  return cudaLibraryLoadData(library, content.str().c_str(), options, values, count,
                             library_options, library_values, library_count);
}

FUSED_PEFT_SIM_API cudaError_t cudaLibraryUnload(cudaLibrary_t handle) {
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  Library* library = library_of(handle);
  for (const auto& [name, kernel] : library->kernels) process.kernels.erase(kernel);
  delete library;
  return cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library,
                                                    const char* name) {
  return guarded([&] {
    HostKernel* found = kernel_of(*library_of(library), name);
    if (!found) return cudaErrorSymbolNotFound;
    *kernel = reinterpret_cast<cudaKernel_t>(found);
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaLibraryGetKernelCount(unsigned* count, cudaLibrary_t library) {
  return guarded([&] {
    *count = unsigned(library_of(library)->module->module().kernels().size());
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaLibraryEnumerateKernels(cudaKernel_t* kernels, unsigned count,
                                                           cudaLibrary_t handle) {
  return guarded([&] {
    Library& library = *library_of(handle);
    const std::vector<std::string> names = library.module->module().kernels();
    for (unsigned i = 0; i < count && i < names.size(); ++i)
      kernels[i] = reinterpret_cast<cudaKernel_t>(kernel_of(library, names[i]));
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaLibraryGetGlobal(void** address, size_t* bytes,
                                                    cudaLibrary_t library, const char* name) {
  return guarded([&] {
    for (const GlobalVariable& variable : library_of(library)->module->module().variables()) {
      if (variable.name != name) continue;
      if (address) *address = variable.address;
      if (bytes) *bytes = variable.bytes;
      return cudaSuccess;
    }
    return cudaErrorSymbolNotFound;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  HostKernel* found = find_kernel(function);
  if (!found) return set_error(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(found);
  return cudaSuccess;
}
