// The Decoding of one instruction: qualifiers and operands of its Ast, resolved in its scope.
#pragma once

#include "simulator/program/builder.h"

namespace fused_peft::sim {

class InstructionDecoding final : public Decoding {
 public:
  InstructionDecoding(ProgramBuilder& builder, Activation& activation, const InstructionText& text);

  std::string_view opcode() const override { return text_.opcode; }
  bool has(std::string_view qualifier) const override;
  bool take(std::string_view qualifier) override;
  std::string_view take_one(std::initializer_list<std::string_view> qualifiers) override;
  Type take_type() override;
  Type need_type() override;

  OperandText next_operand() const override;
  int vector_length() const override;
  int operands_left() const override;
  int next_width() const override;
  void dest(Type type, bool allow_wider) override;
  void source(Type type, bool allow_wider) override;
  void carry_dest() override;
  void carry_source() override;
  void open_vector() override;
  void close_vector() override;
  bool has_second_predicate() const override;
  void address() override;
  void open_address() override;
  void close_address() override;
  int64_t immediate() override;
  bool next_is_immediate() const override;
  std::string name() override;
  Space symbol_space() const override;

  void handler(Handler run, InstrClass kind, uint8_t flags) override;
  Instr& instr() override { return instr_; }
  void keep(std::shared_ptr<const void> extra) override;
  [[noreturn]] void unsupported(const std::string& what) const override;
  [[noreturn]] void malformed(const std::string& what) const override;

  // What the decode function has made of it; throws where it left something of the text unread.
  Instr finish();

 private:
  // The operands of one nesting level: what is left of them.
  struct Level {
    const ptx::Node* next;
    const ptx::Node* end;
  };
  const ptx::Node* peek() const;
  const ptx::Node& need_next(const char* what);
  void skip() { ++levels_.back().next; }
  OperandText kind_of(const ptx::Node& node) const;
  std::span<const ptx::Node> elements_of(const ptx::Node& node) const;
  const Symbol* lookup(const ptx::Node& node) const;
  const Operand& register_of(const ptx::Node& node) const;
  Operand source_operand(const ptx::Node& node, Type type, bool allow_wider);
  Operand symbol_operand(const ptx::Node& node, Type type);
  Operand address_base(const ptx::Node& node);
  void add_dest(const Operand& operand);
  void add_source(const Operand& operand);
  void check_width(const Operand& operand, Type type, bool allow_wider,
                   const ptx::Node& node) const;
  void label(const ptx::Node& node, uint32_t statement);
  std::string where() const;

  ProgramBuilder& builder_;
  Activation& activation_;
  const InstructionText& text_;
  uint64_t taken_ = 0;  // bit i: qualifier i
  std::vector<Level> levels_;
  mutable std::deque<std::vector<ptx::Node>> made_;  // elements of vector registers
  std::vector<Operand> operands_;  // destinations first; Instr::operands points here until finish()
  Instr instr_;
};

std::string clean_text(std::string_view text);

}  // namespace fused_peft::sim
