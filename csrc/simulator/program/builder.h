// Ast -> Program: scopes, storage and calls of one kernel; each instruction goes through its
// family's decode function.
#pragma once

#include <deque>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "simulator/core/decoder.h"
#include "simulator/program/constant_pool.h"
#include "simulator/program/frame.h"
#include "simulator/program/globals.h"
#include "simulator/program/scope.h"
#include "simulator/ptx/ast.h"

namespace fused_peft::sim {

// An instruction about to be decoded: one of the text, or one that an inlined call needs.
struct InstructionText {
  std::string_view opcode;
  std::span<const std::string_view> qualifiers;
  std::span<const ptx::Node> operands;
  std::string_view guard;
  bool guard_negated = false;
  uint32_t line = 0;
  std::string_view text;
};

constexpr std::string_view kMadeLabel = "(label)";  // no name of a text

// A function body on its way into the program: the kernel's, or that of a call being inlined.
struct Activation {
  const ptx::Function& function;
  const LabelTable& labels;
  Activation* caller = nullptr;
  std::deque<Scope> scopes;
  std::vector<uint32_t> blocks{0};  // numbers of the open blocks, as LabelTable counts them
  uint32_t blocks_seen = 1;
  std::unordered_map<uint32_t, uint32_t> positions;  // kLabel statement -> index into Program::code
  Operand carry;

  struct Fixup {
    uint32_t instruction;
    uint32_t statement;                              // kLabel, kTargets, or one of make_label()
    std::shared_ptr<std::vector<uint32_t>> targets;  // of kTargets
  };
  std::vector<Fixup> fixups;
  // A label that the text does not have, as an operand of a branch: its number is in Node::value,
  // its position comes into `positions` like a statement's.
  ptx::Node make_label();
  uint32_t labels_made = 0;
  ptx::Node end;  // where a return of an inlined function goes

  Activation(const ptx::Function& function, const LabelTable& labels)
      : function(function), labels(labels) {}
  Scope& scope() { return scopes.back(); }
  uint32_t block() const { return blocks.back(); }
};

class ProgramBuilder {
 public:
  ProgramBuilder(const ptx::Ast& ast, const Globals& globals, const ptx::Function& entry);
  std::unique_ptr<Program> build();

 private:
  friend class InstructionDecoding;

  // ---- bodies (builder.cpp)
  void entry_parameters(Activation& activation);
  void body(Activation& activation);
  void open_block(Activation& activation);
  void instruction(Activation& activation, const ptx::Instruction& instruction);
  void patch(Activation& activation);
  void finish();
  const LabelTable& labels_of(const ptx::Function& function);

  // ---- storage (storage.cpp)
  void declare(Activation& activation, const ptx::Variable& variable);
  Symbol symbol_of_variable(const ptx::Variable& variable);
  Symbol private_parameter(const ptx::Variable& variable);
  Symbol shared_variable(const ptx::Variable& variable);
  Symbol module_symbol(std::string_view name);
  const Symbol* find(Activation& activation, std::string_view name);

  // ---- emission (builder.cpp)
  void emit(Activation& activation, const InstructionText& text);
  void append(const Instr& instr, uint32_t line, std::string text);
  // Operands that stay where they are while the program grows.
  const Operand* store(std::span<const Operand> operands);
  // The slot of a special register, filled when the warp starts, or read by an instruction put
  // before this one's.
  Operand special_register(Activation& activation, const std::string& name,
                           const InstructionText& text);
  void set_guard(Activation& activation, const InstructionText& text, Instr& instr);

  // ---- calls (calls.cpp)
  struct Call;
  void call(Activation& activation, const ptx::Instruction& instruction);
  void inline_call(const Call& call);
  void extern_call(const Call& call);
  Symbol pass(const Call& call, const ptx::Variable& formal, const ptx::Node& actual,
              bool into_callee);
  const Symbol* parameter_named(Activation& activation, const ptx::Node& node);
  void move(const Call& call, const ptx::Variable& formal, const Symbol& symbol,
            const ptx::Node& actual, bool into_callee);
  void jump(Activation& activation, const InstructionText& at, const ptx::Node& label,
            bool negate_guard);

  // The nodes in a vector, an address or a list.
  std::span<const ptx::Node> children(const ptx::Node& node) const;
  ptx::Node address_of(const ptx::Node& name);  // "[name]"

  const ptx::Ast& ast_;
  const Globals& globals_;
  const ptx::Function& entry_;
  std::unique_ptr<Program> program_ = std::make_unique<Program>();
  ConstantPool constants_{*program_};
  Frame frame_;
  SourceLine line_;                   // of the last .loc
  std::deque<ptx::Node> made_nodes_;  // counted on from Ast::nodes
  std::unordered_map<const ptx::Function*, LabelTable> labels_;
  std::unordered_map<std::string_view, Symbol> module_symbols_;  // that this kernel has used
  std::unordered_map<const ptx::Variable*, Symbol> shared_;
  std::unordered_map<std::string, Operand> specials_;
  uint64_t local_top_ = 0, private_top_ = 0, shared_top_ = 0;
  uint64_t local_bytes_ = 0, private_bytes_ = 0, local_align_ = 16;
  bool uses_dynamic_shared_ = false;
};

}  // namespace fused_peft::sim
