// Device memory is host memory: allocation registers it, copies are memcpy, streams are in order.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

#include "simulator/runtime/api.h"

namespace fused_peft::sim {
namespace {

// What cudaMalloc aligns to; also the gap behind a buffer, so that running over its end meets no
// other.
constexpr size_t kAlignment = 512;

// FUSED_PEFT_SIMULATOR_DUMP names a folder: each buffer's bytes are written to it when the program
// frees it, as <n>.bin for the n-th allocation.
class Dump {
 public:
  static Dump& get() {
    static Dump* dump = new Dump;
    return *dump;
  }
  void allocated(const void* address) {
    const std::lock_guard lock(mutex_);
    number_[address] = count_++;
  }
  void freed(const void* address) {
    const std::lock_guard lock(mutex_);
    const auto found = number_.find(address);
    if (found == number_.end()) return;
    if (folder_) {
      const auto bytes = MemoryMap::global().find(address);
      std::ofstream(std::string(folder_) + "/" + std::to_string(found->second) + ".bin",
                    std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
    }
    number_.erase(found);
  }

 private:
  const char* folder_ = std::getenv("FUSED_PEFT_SIMULATOR_DUMP");
  std::mutex mutex_;
  uint64_t count_ = 0;
  std::map<const void*, uint64_t> number_;
};

cudaError_t allocate(void** address, size_t bytes, bool initialised) {
  return guarded([&] {
    if (!address) return cudaErrorInvalidValue;
    *address = nullptr;
    if (bytes == 0) return cudaSuccess;
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
    if (rounded < bytes || int64_t(rounded) > Process::get().device->global_bytes)
      return cudaErrorMemoryAllocation;
    void* memory = std::aligned_alloc(kAlignment, rounded);
    if (!memory) return cudaErrorMemoryAllocation;
    MemoryMap::global().add(memory, bytes, initialised,
                            "cudaMalloc(" + std::to_string(bytes) + ")");
    *address = memory;
    Dump::get().allocated(memory);
    return cudaSuccess;
  });
}

cudaError_t release(void* address) {
  return guarded([&] {
    if (!address) return cudaSuccess;
    Dump::get().freed(address);
    if (!MemoryMap::global().remove(address)) return cudaErrorInvalidValue;
    std::free(address);
    return cudaSuccess;
  });
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  return guarded([&] {
    std::memmove(to, from, bytes);
    MemoryMap::global().mark_initialised(to, bytes);
    return cudaSuccess;
  });
}

cudaError_t fill(void* to, int value, size_t bytes) {
  return guarded([&] {
    std::memset(to, value, bytes);
    MemoryMap::global().mark_initialised(to, bytes);
    return cudaSuccess;
  });
}

struct SymbolMemory {
  std::byte* address = nullptr;
  uint64_t bytes = 0;
};

SymbolMemory find_symbol(const void* symbol) {
  Process& process = Process::get();
  const std::lock_guard lock(process.mutex);
  const auto found = process.variables.find(symbol);
  if (found == process.variables.end()) return {};
  for (const GlobalVariable& variable : found->second.module->module().variables())
    if (variable.name == found->second.name) return {variable.address, variable.bytes};
  return {};
}

}  // namespace
}  // namespace fused_peft::sim

using namespace fused_peft::sim;

FUSED_PEFT_SIM_API cudaError_t cudaMalloc(void** address, size_t bytes) {
  return allocate(address, bytes, false);
}
FUSED_PEFT_SIM_API cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) {
  return allocate(address, bytes, false);
}
FUSED_PEFT_SIM_API cudaError_t cudaMallocManaged(void** address, size_t bytes, unsigned) {
  return allocate(address, bytes, true);
}
// The host may write pinned memory without the runtime's knowledge: taken as initialised.
FUSED_PEFT_SIM_API cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return allocate(address, bytes, true);
}
FUSED_PEFT_SIM_API cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return allocate(address, bytes, true);
}
FUSED_PEFT_SIM_API cudaError_t cudaFree(void* address) { return release(address); }
FUSED_PEFT_SIM_API cudaError_t cudaFreeAsync(void* address, cudaStream_t) {
  return release(address);
}
FUSED_PEFT_SIM_API cudaError_t cudaFreeHost(void* address) { return release(address); }

FUSED_PEFT_SIM_API cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  MemoryMap::global().add(address, bytes, true, "cudaHostRegister");
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaHostUnregister(void* address) {
  return set_error(MemoryMap::global().remove(address) ? cudaSuccess
                                                       : cudaErrorHostMemoryNotRegistered);
}
FUSED_PEFT_SIM_API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

FUSED_PEFT_SIM_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes,
                                          cudaMemcpyKind) {
  return copy(to, from, bytes);
}
FUSED_PEFT_SIM_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                                               cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}
FUSED_PEFT_SIM_API cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from,
                                            size_t from_pitch, size_t width, size_t height,
                                            cudaMemcpyKind) {
  for (size_t row = 0; row < height; ++row)
    if (const cudaError_t error = copy(static_cast<char*>(to) + row * to_pitch,
                                       static_cast<const char*>(from) + row * from_pitch, width))
      return error;
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from,
                                                 size_t from_pitch, size_t width, size_t height,
                                                 cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
FUSED_PEFT_SIM_API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return fill(to, value, bytes);
}
FUSED_PEFT_SIM_API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return fill(to, value, bytes);
}

FUSED_PEFT_SIM_API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from,
                                                  size_t bytes, size_t offset, cudaMemcpyKind) {
  return guarded([&] {
    const SymbolMemory memory = find_symbol(symbol);
    if (!memory.address) return cudaErrorInvalidSymbol;
    if (offset + bytes > memory.bytes) return cudaErrorInvalidValue;
    return copy(memory.address + offset, from, bytes);
  });
}
FUSED_PEFT_SIM_API cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from,
                                                       size_t bytes, size_t offset,
                                                       cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
FUSED_PEFT_SIM_API cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes,
                                                    size_t offset, cudaMemcpyKind) {
  return guarded([&] {
    const SymbolMemory memory = find_symbol(symbol);
    if (!memory.address) return cudaErrorInvalidSymbol;
    if (offset + bytes > memory.bytes) return cudaErrorInvalidValue;
    return copy(to, memory.address + offset, bytes);
  });
}
FUSED_PEFT_SIM_API cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  return guarded([&] {
    const SymbolMemory memory = find_symbol(symbol);
    if (!memory.address) return cudaErrorInvalidSymbol;
    *address = memory.address;
    return cudaSuccess;
  });
}
FUSED_PEFT_SIM_API cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  return guarded([&] {
    const SymbolMemory memory = find_symbol(symbol);
    if (!memory.address) return cudaErrorInvalidSymbol;
    *bytes = memory.bytes;
    return cudaSuccess;
  });
}

FUSED_PEFT_SIM_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = size_t(Process::get().device->global_bytes);
  *free = *total;
  return cudaSuccess;
}
FUSED_PEFT_SIM_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                                        const void* address) {
  *attributes = {};
  const bool device = MemoryMap::global().find(address).data() != nullptr;
  attributes->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = device ? const_cast<void*>(address) : nullptr;
  attributes->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}
