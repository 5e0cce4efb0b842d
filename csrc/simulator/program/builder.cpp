#include "simulator/program/builder.h"

#include <algorithm>
#include <tuple>

#include "simulator/exec/special.h"
#include "simulator/program/decoding.h"
#include "simulator/ptx/lexer.h"

namespace fused_peft::sim {
namespace {

// Calls are inlined, so a program can be longer than its text.
constexpr std::size_t kMaxInstructions = std::size_t{1} << 21;
constexpr std::size_t kOperandChunk = 4096;

std::span<const std::string_view> qualifiers_of(const ptx::Ast& ast,
                                                const ptx::Instruction& instruction) {
  return {ast.names.data() + instruction.qualifiers.first, instruction.qualifiers.count};
}

}  // namespace

ptx::Node Activation::make_label() {
  ptx::Node node;
  node.name = kMadeLabel;
  node.value = 0x80000000u + labels_made++;
  return node;
}

ProgramBuilder::ProgramBuilder(const ptx::Ast& ast, const Globals& globals,
                               const ptx::Function& entry)
    : ast_(ast), globals_(globals), entry_(entry) {}

std::unique_ptr<Program> ProgramBuilder::build() {
  Program& program = *program_;
  program.name = entry_.name;
  program.files = ast_.files;
  program.target_sm = ast_.target_sm;
  program.target_arch_specific = ast_.arch_specific;
  std::copy_n(entry_.max_threads, 3, program.max_threads);
  std::copy_n(entry_.required_threads, 3, program.required_threads);
  std::copy_n(entry_.required_cluster, 3, program.required_cluster);
  program.explicit_cluster = entry_.explicit_cluster;
  program.max_registers = entry_.max_registers;

  Activation activation(entry_, labels_of(entry_));
  activation.scopes.emplace_back(nullptr);
  activation.carry = frame_.allocate(Type::kPred);
  entry_parameters(activation);
  body(activation);
  // A thread that runs off the end exits.
  const std::string_view exit = "exit";
  emit(activation, {exit, {}, {}, {}, false, entry_.line, exit});
  patch(activation);
  finish();
  return std::move(program_);
}

void ProgramBuilder::finish() {
  Program& program = *program_;
  program.frame_bytes = frame_.bytes();
  program.num_registers = frame_.registers();
  program.local_bytes = uint32_t((local_bytes_ + local_align_ - 1) & ~(local_align_ - 1));
  program.private_bytes = uint32_t((private_bytes_ + 15) & ~uint64_t{15});
  program.static_shared_bytes = uint32_t(shared_top_);
  const uint64_t align = program.dynamic_shared_align;
  program.dynamic_shared_offset = uint32_t((kSharedStart + shared_top_ + align - 1) & ~(align - 1));
  constants_.set_patched(program.dynamic_shared_offset);
  for (uint32_t i = 0; i < program.code.size(); ++i) program.code[i].index = i;
}

const LabelTable& ProgramBuilder::labels_of(const ptx::Function& function) {
  return labels_.try_emplace(&function, function).first->second;
}

void ProgramBuilder::open_block(Activation& activation) {
  activation.scopes.emplace_back(&activation.scopes.back());
  activation.blocks.push_back(activation.blocks_seen++);
}

void ProgramBuilder::body(Activation& activation) {
  const std::vector<ptx::Statement>& statements = activation.function.body;
  std::vector<std::pair<uint64_t, uint64_t>> tops;  // local and private memory at the open blocks
  for (uint32_t i = 0; i < statements.size(); ++i) {
    const ptx::Statement& statement = statements[i];
    switch (statement.kind) {
      case ptx::StatementKind::kInstruction:
        instruction(activation, ast_.instructions[statement.index]);
        break;
      case ptx::StatementKind::kVariable:
        declare(activation, ast_.variables[statement.index]);
        break;
      case ptx::StatementKind::kLabel:
        activation.positions[i] = uint32_t(program_->code.size());
        break;
      case ptx::StatementKind::kLocation: {
        const ptx::Location& location = ast_.locations[statement.index];
        line_ = {0, location.file, location.line, location.caller_file, location.caller_line};
        break;
      }
      case ptx::StatementKind::kOpen:
        tops.emplace_back(local_top_, private_top_);
        open_block(activation);
        break;
      case ptx::StatementKind::kClose:
        std::tie(local_top_, private_top_) = tops.back();
        tops.pop_back();
        activation.scopes.pop_back();
        activation.blocks.pop_back();
        break;
      case ptx::StatementKind::kTargets:
      case ptx::StatementKind::kPrototype: break;
    }
  }
}

void ProgramBuilder::instruction(Activation& activation, const ptx::Instruction& instruction) {
  if (instruction.opcode == "call") return call(activation, instruction);
  InstructionText text{instruction.opcode,
                       qualifiers_of(ast_, instruction),
                       {ast_.nodes.data() + instruction.operands.first, instruction.operands.count},
                       instruction.guard,
                       instruction.guard_negated,
                       instruction.line,
                       instruction.text};
  if (instruction.opcode == "ret") {
    if (activation.caller) return jump(activation, text, activation.end, false);
    text.opcode = "exit";
    text.qualifiers = {};  // .uni
  }
  emit(activation, text);
}

void ProgramBuilder::emit(Activation& activation, const InstructionText& text) {
  const DecodeFunction decode = find_opcode(text.opcode);
  InstructionDecoding decoding(*this, activation, text);
  if (!decode) decoding.unsupported("instruction " + std::string(text.opcode));
  Instr guard;
  set_guard(activation, text, guard);
  const std::size_t fixups = activation.fixups.size();
  decode(decoding);
  Instr instr = decoding.finish();
  instr.guard = guard.guard;
  instr.guard_reg = guard.guard_reg;
  instr.guard_negated = guard.guard_negated;
  for (std::size_t i = fixups; i < activation.fixups.size(); ++i) {
    activation.fixups[i].instruction = uint32_t(program_->code.size());
  }
  append(instr, text.line, clean_text(text.text));
}

void ProgramBuilder::append(const Instr& instr, uint32_t line, std::string text) {
  if (program_->code.size() >= kMaxInstructions) {
    throw Unsupported("kernel '" + program_->name + "' has more than " +
                      std::to_string(kMaxInstructions) +
                      " instructions once its calls are inlined");
  }
  program_->code.push_back(instr);
  program_->lines.push_back({line, line_.file, line_.line, line_.caller_file, line_.caller_line});
  program_->texts.push_back(std::move(text));
}

void ProgramBuilder::set_guard(Activation& activation, const InstructionText& text, Instr& instr) {
  if (text.guard.empty()) return;
  const Symbol* symbol = find(activation, text.guard);
  if (!symbol || symbol->kind != SymbolKind::kRegister || symbol->type != Type::kPred) {
    ptx::syntax_error(text.line,
                      "guard '" + std::string(text.guard) + "' is no predicate register");
  }
  instr.guard = symbol->slot.offset;
  instr.guard_reg = symbol->slot.reg;
  instr.guard_negated = text.guard_negated;
}

const Operand* ProgramBuilder::store(std::span<const Operand> operands) {
  auto& pool = program_->operand_pool;
  if (pool.empty() || pool.back().capacity() - pool.back().size() < operands.size()) {
    pool.emplace_back().reserve(std::max(kOperandChunk, operands.size()));
  }
  std::vector<Operand>& chunk = pool.back();
  const Operand* const first = chunk.data() + chunk.size();
  chunk.insert(chunk.end(), operands.begin(), operands.end());
  return first;
}

Operand ProgramBuilder::special_register(Activation& activation, const std::string& name,
                                         const InstructionText& text) {
  const SpecialRegister* const special = find_special(name);
  const auto [place, is_new] = specials_.try_emplace(name);
  if (is_new) {
    place->second = frame_.allocate(special->bytes == 8   ? Type::kU64
                                    : special->bytes == 4 ? Type::kU32
                                    : special->bytes == 2 ? Type::kU16
                                                          : Type::kPred);
    if (!special->read) program_->specials.push_back({name, place->second});
  }
  if (special->read) {
    Instr instr;
    instr.run = special->read;
    instr.kind = InstrClass::kMove;
    instr.num_dests = 1;
    instr.operands = store({&place->second, 1});
    set_guard(activation, text, instr);
    append(instr, text.line, "read " + name);
  }
  return place->second;
}

void ProgramBuilder::patch(Activation& activation) {
  for (const Activation::Fixup& fixup : activation.fixups) {
    if (!fixup.targets) {
      program_->code[fixup.instruction].target = activation.positions.at(fixup.statement);
      continue;
    }
    const ptx::Statement& statement = activation.function.body[fixup.statement];
    const ptx::Range& list = ast_.target_lists[statement.index];
    for (uint32_t i = 0; i < list.count; ++i) {
      const std::string_view name = ast_.names[list.first + i];
      const uint32_t label =
          activation.labels.find(activation.labels.block_of(fixup.statement), name);
      const auto position = activation.positions.find(label);
      if (position == activation.positions.end()) {
        ptx::syntax_error(statement.line, "no label '" + std::string(name) + "' in this scope");
      }
      fixup.targets->push_back(position->second);
    }
  }
}

}  // namespace fused_peft::sim
