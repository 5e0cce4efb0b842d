// Memory that kernels may touch: the buffers that the host has registered, of the whole process.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <span>
#include <string>
#include <vector>

namespace fused_peft::sim {

// One buffer, and which of its bytes hold data.
class Buffer {
 public:
  Buffer(uint64_t start, uint64_t bytes, bool initialised, std::string name);

  const uint64_t start;
  const uint64_t bytes;
  const std::string name;

  bool contains(uint64_t address, uint64_t count) const {
    return address >= start && address - start <= bytes && count <= bytes - (address - start);
  }
  // No bookkeeping is needed any more: every byte has been initialised by the host.
  bool all_initialised() const { return complete_.load(std::memory_order_relaxed); }
  bool initialised(uint64_t address, uint64_t count) const;
  void set_initialised(uint64_t address, uint64_t count);

 private:
  std::vector<uint64_t> bits_;  // one a byte; not kept while complete_
  std::atomic<bool> complete_;
};

// Thread-safe. A launch keeps the buffers it has seen alive until its end.
class MemoryMap {
 public:
  static MemoryMap& global();
  void add(const void* address, uint64_t bytes, bool initialised, std::string name);
  bool remove(const void* address);                            // false: not the start of a buffer
  void mark_initialised(const void* address, uint64_t bytes);  // memset, memcpy to it
  // The buffer that holds the address: its start and size; {nullptr, 0} if none.
  std::span<std::byte> find(const void* address) const;

  // The same as objects: one that holds the address, and the last that starts at or below it.
  std::shared_ptr<Buffer> buffer_at(uint64_t address) const;
  std::shared_ptr<Buffer> buffer_below(uint64_t address) const;

 private:
  mutable std::shared_mutex mutex_;
  // By start; views of one array may be registered side by side.
  std::multimap<uint64_t, std::shared_ptr<Buffer>> buffers_;
};

}  // namespace fused_peft::sim
