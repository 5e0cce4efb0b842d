#include "simulator/check/memory_map.h"

#include <algorithm>
#include <mutex>

#include "simulator/check/bits.h"

namespace fused_peft::sim {

Buffer::Buffer(uint64_t start, uint64_t bytes, bool initialised, std::string name)
    : start(start),
      bytes(bytes),
      name(std::move(name)),
      bits_(initialised ? 0 : (bytes + 63) / 64),
      complete_(initialised) {}

bool Buffer::initialised(uint64_t address, uint64_t count) const {
  return all_initialised() || all_bits(bits_.data(), address - start, count);
}

void Buffer::set_initialised(uint64_t address, uint64_t count) {
  if (all_initialised()) return;
  if (address == start && count == bytes) {
    complete_.store(true, std::memory_order_relaxed);
    return;
  }
  // Worker threads may write neighbouring bytes.
  for_words(address - start, count, [&](uint64_t word, uint64_t mask) {
    std::atomic_ref<uint64_t> bits(bits_[word]);
    if ((mask & ~bits.load(std::memory_order_relaxed)) != 0)
      bits.fetch_or(mask, std::memory_order_relaxed);
  });
}

MemoryMap& MemoryMap::global() {
  static MemoryMap* map = new MemoryMap;  // never destroyed: static destructors free device memory
  return *map;
}

void MemoryMap::add(const void* address, uint64_t bytes, bool initialised, std::string name) {
  const auto start = reinterpret_cast<uint64_t>(address);
  auto buffer = std::make_shared<Buffer>(start, bytes, initialised, std::move(name));
  std::unique_lock lock(mutex_);
  buffers_.emplace(start, std::move(buffer));
}

bool MemoryMap::remove(const void* address) {
  std::unique_lock lock(mutex_);
  const auto found = buffers_.find(reinterpret_cast<uint64_t>(address));
  if (found == buffers_.end()) return false;
  buffers_.erase(found);
  return true;
}

void MemoryMap::mark_initialised(const void* address, uint64_t bytes) {
  const auto first = reinterpret_cast<uint64_t>(address);
  const std::shared_ptr<Buffer> buffer = buffer_at(first);
  if (buffer == nullptr) return;
  buffer->set_initialised(first, std::min(bytes, buffer->start + buffer->bytes - first));
}

std::span<std::byte> MemoryMap::find(const void* address) const {
  const std::shared_ptr<Buffer> buffer = buffer_at(reinterpret_cast<uint64_t>(address));
  if (buffer == nullptr) return {};
  return {reinterpret_cast<std::byte*>(buffer->start), buffer->bytes};
}

std::shared_ptr<Buffer> MemoryMap::buffer_at(uint64_t address) const {
  std::shared_lock lock(mutex_);
  for (auto next = buffers_.upper_bound(address); next != buffers_.begin();) {
    --next;
    if (next->second->contains(address, 1)) return next->second;
  }
  return nullptr;
}

std::shared_ptr<Buffer> MemoryMap::buffer_below(uint64_t address) const {
  std::shared_lock lock(mutex_);
  auto next = buffers_.upper_bound(address);
  return next == buffers_.begin() ? nullptr : std::prev(next)->second;
}

}  // namespace fused_peft::sim
