#include "simulator/program/globals.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <string>

#include "simulator/check/memory_map.h"
#include "simulator/core/errors.h"
#include "simulator/program/immediate.h"
#include "simulator/ptx/lexer.h"

namespace fused_peft::sim {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{1} << 30;
constexpr uint64_t kGap = 256;  // between variables, so that an access beyond one is seen
constexpr uint64_t kMaxConst = 64 * 1024;

bool in_module_memory(const ptx::Variable& variable) {
  const bool kind =
      variable.storage == ptx::Storage::kGlobal || variable.storage == ptx::Storage::kConst;
  return kind && !variable.is_extern;
}

}  // namespace

Globals::Pages::~Pages() {
  if (start) munmap(start, bytes);
}

Globals::Globals(const ptx::Ast& ast) : ast_(ast) {
  declare();
  collect();
  allocate();
  for (const ptx::Variable* variable : owned_) initialise(*variable);
  for (const ptx::Variable* variable : owned_) {
    if (variable->bytes() == 0) continue;
    MemoryMap::global().add(address(*variable), variable->bytes(), true,
                            std::string(variable->name));
  }
}

Globals::~Globals() {
  for (const ptx::Variable* variable : owned_) {
    if (variable->bytes()) MemoryMap::global().remove(address(*variable));
  }
}

void Globals::collect() {
  for (const ptx::Variable& variable : ast_.module_variables) {
    if (in_module_memory(variable) && variables_.at(variable.name) == &variable)
      owned_.push_back(&variable);
  }
  for (const ptx::Variable& variable : ast_.variables) {
    if (in_module_memory(variable)) owned_.push_back(&variable);
  }
}

void Globals::declare() {
  for (const ptx::Variable& variable : ast_.module_variables) {
    const ptx::Variable*& known = variables_[variable.name];
    if (known && !known->is_extern && !variable.is_extern) {
      ptx::syntax_error(variable.line, "'" + std::string(variable.name) + "' is defined twice");
    }
    if (!known || known->is_extern) known = &variable;
  }
  for (const ptx::Function& function : ast_.functions) {
    const ptx::Function*& known = functions_[function.name];
    if (known && known->has_body && function.has_body) {
      ptx::syntax_error(function.line, "'" + std::string(function.name) + "' is defined twice");
    }
    if (!known || !known->has_body) known = &function;
  }
}

void Globals::allocate() {
  uint64_t total = 0, largest_align = 4096;
  std::vector<uint64_t> offsets;
  for (const ptx::Variable* variable : owned_) {
    const uint64_t align = std::max<uint64_t>(variable->align, kGap);
    const uint64_t limit = variable->storage == ptx::Storage::kConst ? kMaxConst : kMaxBytes;
    total = (total + kGap + align - 1) & ~(align - 1);
    if (variable->elements > limit || variable->bytes() > limit ||
        total + variable->bytes() > kMaxBytes) {
      throw Unsupported("PTX line " + std::to_string(variable->line) + ": '" +
                        std::string(variable->name) +
                        "' is larger than the memory set aside for it");
    }
    offsets.push_back(total);
    total += variable->bytes();
    largest_align = std::max(largest_align, align);
  }
  if (owned_.empty()) return;
  memory_.bytes = total + kGap + largest_align;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const pages = mmap(nullptr, memory_.bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  memory_.start = static_cast<std::byte*>(pages);
  const uint64_t skip = -reinterpret_cast<uint64_t>(pages) & (largest_align - 1);
  for (std::size_t i = 0; i < owned_.size(); ++i) {
    const ptx::Variable& variable = *owned_[i];
    std::byte* const address = memory_.start + skip + offsets[i];
    addresses_[&variable] = address;
    if (const auto named = variables_.find(variable.name);
        named != variables_.end() && named->second == &variable) {
      const bool is_constant = variable.storage == ptx::Storage::kConst;
      listed_.push_back({std::string(variable.name), address, variable.bytes(), is_constant});
    }
  }
}

const ptx::Variable* Globals::variable(std::string_view name) const {
  const auto place = variables_.find(name);
  return place == variables_.end() ? nullptr : place->second;
}

std::byte* Globals::address(const ptx::Variable& variable) const {
  const auto place = addresses_.find(&variable);
  return place == addresses_.end() ? nullptr : place->second;
}

const ptx::Function* Globals::function(std::string_view name) const {
  constexpr int kMaxAliases = 8;
  for (int i = 0; i < kMaxAliases; ++i) {
    if (const auto alias = ast_.aliases.find(name); alias != ast_.aliases.end()) {
      name = alias->second;
    } else {
      const auto place = functions_.find(name);
      return place == functions_.end() ? nullptr : place->second;
    }
  }
  return nullptr;
}

uint64_t Globals::address_of(const ptx::InitialValue& value) const {
  uint64_t base = 0;
  if (const ptx::Variable* target = variable(value.symbol)) {
    const std::byte* const address = this->address(*target);
    if (!address) {
      throw Unsupported("PTX line " + std::to_string(value.line) + ": address of '" +
                        std::string(value.symbol) +
                        "', which this module does not define, in an initialiser");
    }
    base = reinterpret_cast<uint64_t>(address);
  } else if (const ptx::Function* target_function = function(value.symbol)) {
    base = function_address(*target_function);
  } else {
    ptx::syntax_error(value.line,
                      "unknown name '" + std::string(value.symbol) + "' in an initialiser");
  }
  const uint64_t address = base + uint64_t(value.addend);
  return value.mask ? (address & value.mask) >> std::countr_zero(value.mask) : address;
}

uint64_t Globals::value_of(const ptx::Variable& variable, const ptx::InitialValue& value) const {
  if (value.kind == ptx::InitialValue::Kind::kAddress) return address_of(value);
  const bool is_float = value.kind == ptx::InitialValue::Kind::kFloat;
  uint64_t bits = 0;
  if (!immediate_bits(is_float, value.is_single, value.bits, variable.type, &bits)) {
    ptx::syntax_error(value.line,
                      std::string("value of the wrong kind for ") + name_of(variable.type));
  }
  return bits;
}

void Globals::initialise(const ptx::Variable& variable) const {
  if (!variable.has_initial) return;
  const std::size_t width = std::size_t(bytes_of(variable.type));
  std::byte* const start = address(variable);
  for (uint32_t i = 0; i < variable.initial.count; ++i) {
    const ptx::InitialValue& value = ast_.initial_values[variable.initial.first + i];
    const uint64_t words[2] = {value_of(variable, value), 0};
    std::memcpy(start + value.element * width, words, width);
  }
}

}  // namespace fused_peft::sim
