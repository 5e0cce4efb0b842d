#include "simulator/program/scope.h"

#include <charconv>

#include "simulator/ptx/lexer.h"

namespace fused_peft::sim {

Symbol make_register(Type type, uint8_t vector, Frame& frame) {
  Symbol symbol;
  symbol.type = type;
  symbol.vector = vector;
  if (vector == 1) {
    symbol.kind = SymbolKind::kRegister;
    symbol.slot = frame.allocate(type);
    return symbol;
  }
  symbol.kind = SymbolKind::kVectorRegister;
  for (int i = 0; i < vector; ++i) symbol.components[i] = frame.allocate(type);
  return symbol;
}

bool Scope::declare(std::string_view name, const Symbol& symbol) {
  return symbols_.try_emplace(name, symbol).second;
}

bool Scope::declare_numbered(std::string_view prefix, uint32_t count, Type type, uint8_t vector) {
  for (const Numbered& other : numbered_) {
    if (other.prefix == prefix) return false;
  }
  numbered_.push_back({prefix, count, type, vector});
  return true;
}

const Symbol* Scope::find_numbered(std::string_view name, Frame& frame) {
  std::size_t length = name.size();
  while (length > 0 && name[length - 1] >= '0' && name[length - 1] <= '9') --length;
  const std::string_view prefix = name.substr(0, length), number = name.substr(length);
  if (number.empty() || (number.size() > 1 && number[0] == '0')) return nullptr;
  for (const Numbered& numbered : numbered_) {
    if (numbered.prefix != prefix) continue;
    uint32_t index = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), index);
    if (error != std::errc() || index >= numbered.count) return nullptr;
    return &symbols_.emplace(name, make_register(numbered.type, numbered.vector, frame))
                .first->second;
  }
  return nullptr;
}

const Symbol* Scope::find(std::string_view name, Frame& frame) {
  for (Scope* scope = this; scope; scope = scope->parent_) {
    if (const auto place = scope->symbols_.find(name); place != scope->symbols_.end())
      return &place->second;
    if (scope->numbered_.empty()) continue;
    if (const Symbol* symbol = scope->find_numbered(name, frame)) return symbol;
  }
  return nullptr;
}

LabelTable::LabelTable(const ptx::Function& function) : parents_{0}, labels_(1) {
  uint32_t block = 0;
  for (std::size_t i = 0; i < function.body.size(); ++i) {
    const ptx::Statement& statement = function.body[i];
    if (statement.kind == ptx::StatementKind::kOpen) {
      parents_.push_back(block);
      labels_.emplace_back();
      block = uint32_t(parents_.size() - 1);
    } else if (statement.kind == ptx::StatementKind::kClose) {
      block = parents_[block];
    } else if (statement.kind == ptx::StatementKind::kLabel ||
               statement.kind == ptx::StatementKind::kTargets) {
      if (!labels_[block].try_emplace(statement.name, uint32_t(i)).second) {
        ptx::syntax_error(statement.line,
                          "label '" + std::string(statement.name) + "' stands twice in its block");
      }
      if (statement.kind == ptx::StatementKind::kTargets) target_blocks_[uint32_t(i)] = block;
    }
  }
}

uint32_t LabelTable::find(uint32_t block, std::string_view name) const {
  for (;; block = parents_[block]) {
    if (const auto place = labels_[block].find(name); place != labels_[block].end())
      return place->second;
    if (block == 0) return kMissing;
  }
}

}  // namespace fused_peft::sim
