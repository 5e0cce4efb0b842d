// Where the variables of a kernel lie: registers, local, shared and parameter memory.
#include "simulator/core/errors.h"
#include "simulator/program/builder.h"
#include "simulator/ptx/lexer.h"

namespace fused_peft::sim {
namespace {

constexpr uint64_t kMaxLocal = 512 * 1024;  // of one thread, as on every GPU so far
constexpr uint64_t kMaxShared = 16 * 1024 * 1024 - kSharedStart;  // what an address can say
constexpr uint64_t kMaxParams = 64 * 1024;

uint64_t align_up(uint64_t value, uint64_t align) { return (value + align - 1) & ~(align - 1); }

// The next place in a kind of memory that grows upwards; `top` moves behind the variable.
uint64_t place(uint64_t& top, const ptx::Variable& variable, uint64_t limit, const char* memory) {
  const uint64_t start = align_up(top, variable.align);
  if (variable.elements > limit || variable.bytes() > limit || start + variable.bytes() > limit) {
    throw Unsupported("PTX line " + std::to_string(variable.line) + ": '" +
                      std::string(variable.name) + "' does not fit into " + memory);
  }
  top = start + variable.bytes();
  return start;
}

Symbol address_symbol(const ptx::Variable& variable, Space space, uint64_t address) {
  Symbol symbol;
  symbol.kind = SymbolKind::kAddress;
  symbol.type = variable.type;
  symbol.vector = variable.vector;
  symbol.space = space;
  symbol.address = address;
  symbol.bytes = variable.bytes();
  return symbol;
}

}  // namespace

void ProgramBuilder::entry_parameters(Activation& activation) {
  uint64_t top = 0;
  for (const ptx::Variable& variable : entry_.params) {
    if (variable.storage != ptx::Storage::kParam) {
      ptx::syntax_error(variable.line, "a kernel's parameters are .param");
    }
    const uint64_t start = place(top, variable, kMaxParams, "the parameters of a kernel");
    program_->params.push_back(
        {std::string(variable.name), uint32_t(start), uint32_t(variable.bytes())});
    if (!activation.scope().declare(variable.name,
                                    address_symbol(variable, Space::kParam, start))) {
      ptx::syntax_error(variable.line, "'" + std::string(variable.name) + "' is declared twice");
    }
  }
  program_->param_bytes = uint32_t(top);
}

Symbol ProgramBuilder::private_parameter(const ptx::Variable& variable) {
  const uint64_t start =
      place(private_top_, variable, kMaxLocal, "the parameters of device functions");
  private_bytes_ = std::max(private_bytes_, private_top_);
  return address_symbol(variable, Space::kParam, kCalleeParam + start);
}

// A variable of a function that is inlined twice is one variable still.
Symbol ProgramBuilder::shared_variable(const ptx::Variable& variable) {
  const auto [entry, is_new] = shared_.try_emplace(&variable);
  if (!is_new) return entry->second;
  Symbol symbol = address_symbol(variable, Space::kShared, 0);
  if (variable.is_extern || (variable.is_array && variable.elements == 0)) {
    symbol.kind = SymbolKind::kDynamicShared;
    program_->dynamic_shared_align = std::max(program_->dynamic_shared_align, variable.align);
  } else {
    symbol.address = kSharedStart + place(shared_top_, variable, kMaxShared, "shared memory");
  }
  return entry->second = symbol;
}

Symbol ProgramBuilder::symbol_of_variable(const ptx::Variable& variable) {
  switch (variable.storage) {
    case ptx::Storage::kReg: return make_register(variable.type, variable.vector, frame_);
    case ptx::Storage::kParam: return private_parameter(variable);
    case ptx::Storage::kShared: return shared_variable(variable);
    case ptx::Storage::kLocal: {
      const uint64_t start = place(local_top_, variable, kMaxLocal, "local memory");
      local_bytes_ = std::max(local_bytes_, local_top_);
      local_align_ = std::max<uint64_t>(local_align_, variable.align);
      return address_symbol(variable, Space::kLocal, start);
    }
    default: break;
  }
  const bool is_constant = variable.storage == ptx::Storage::kConst;
  const std::byte* const address = globals_.address(variable);
  Symbol symbol = address_symbol(variable, is_constant ? Space::kConst : Space::kGlobal,
                                 reinterpret_cast<uint64_t>(address));
  if (!address) symbol.kind = SymbolKind::kUndefined;
  return symbol;
}

void ProgramBuilder::declare(Activation& activation, const ptx::Variable& variable) {
  const auto twice = [&] {
    ptx::syntax_error(variable.line,
                      "'" + std::string(variable.name) + "' is declared twice in its block");
  };
  if (variable.storage == ptx::Storage::kReg &&
      (variable.vector > 4 || variable.type == Type::kNone)) {
    ptx::syntax_error(variable.line, "a register has no such type");
  }
  if (variable.numbered && variable.storage == ptx::Storage::kReg) {
    if (!activation.scope().declare_numbered(variable.name, variable.numbered, variable.type,
                                             variable.vector)) {
      twice();
    }
  } else if (!activation.scope().declare(variable.name, symbol_of_variable(variable))) {
    twice();
  }
}

const Symbol* ProgramBuilder::find(Activation& activation, std::string_view name) {
  if (const Symbol* symbol = activation.scope().find(name, frame_)) return symbol;
  if (name[0] == '%') return nullptr;
  if (const auto known = module_symbols_.find(name); known != module_symbols_.end()) {
    return known->second.kind == SymbolKind::kNone ? nullptr : &known->second;
  }
  Symbol symbol;
  if (const ptx::Variable* variable = globals_.variable(name)) {
    symbol = symbol_of_variable(*variable);
  } else if (const ptx::Function* function = globals_.function(name)) {
    symbol.kind = SymbolKind::kFunction;
    symbol.function = function;
    symbol.address = Globals::function_address(*function);
  }
  const Symbol& kept = module_symbols_.emplace(name, symbol).first->second;
  return kept.kind == SymbolKind::kNone ? nullptr : &kept;
}

}  // namespace fused_peft::sim
