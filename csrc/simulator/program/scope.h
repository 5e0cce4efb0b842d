// What a name means at a place in a function body.
#pragma once

#include <deque>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "simulator/program/frame.h"
#include "simulator/ptx/ast.h"

namespace fused_peft::sim {

enum class SymbolKind : uint8_t {
  kNone,
  kRegister,
  kVectorRegister,
  kAddress,
  kDynamicShared,
  kFunction,
  kUndefined
};

struct Symbol {
  SymbolKind kind = SymbolKind::kNone;
  Type type = Type::kNone;  // of a register, or of an array's elements
  Operand slot;             // of kRegister
  Operand components[4];    // of kVectorRegister
  uint8_t vector = 1;
  Space space = Space::kGeneric;  // of kAddress
  uint64_t address = 0;           // in its space
  uint64_t bytes = 0;
  const ptx::Function* function = nullptr;
};

// The names of one block. Numbered registers (%r<10>) get their slots when they are first used.
class Scope {
 public:
  explicit Scope(Scope* parent) : parent_(parent) {}

  // False if the name is taken in this block.
  bool declare(std::string_view name, const Symbol& symbol);
  bool declare_numbered(std::string_view prefix, uint32_t count, Type type, uint8_t vector);
  // In this block or one around it; nullptr where there is none.
  const Symbol* find(std::string_view name, Frame& frame);

 private:
  struct Numbered {
    std::string_view prefix;
    uint32_t count;
    Type type;
    uint8_t vector;
  };
  const Symbol* find_numbered(std::string_view name, Frame& frame);

  Scope* parent_;
  std::unordered_map<std::string_view, Symbol> symbols_;
  std::vector<Numbered> numbered_;
};

Symbol make_register(Type type, uint8_t vector, Frame& frame);

// The labels of a function body, by the block that they stand in: a branch sees those of its own
// block and of the blocks around it, before and behind it.
class LabelTable {
 public:
  explicit LabelTable(const ptx::Function& function);

  static constexpr uint32_t kMissing = 0xffffffffu;
  // Index of the kLabel or kTargets statement; kMissing. Block 0 is the body, the others are
  // counted by their "{".
  uint32_t find(uint32_t block, std::string_view name) const;
  uint32_t block_of(uint32_t targets_statement) const {
    return target_blocks_.at(targets_statement);
  }

 private:
  std::vector<uint32_t> parents_;
  std::vector<std::unordered_map<std::string_view, uint32_t>> labels_;
  std::unordered_map<uint32_t, uint32_t> target_blocks_;
};

}  // namespace fused_peft::sim
