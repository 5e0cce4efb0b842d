// PTX text -> Ast, by recursive descent with one token of lookahead. Throws SyntaxError with the
// PTX line.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "simulator/ptx/ast.h"
#include "simulator/ptx/lexer.h"

namespace fused_peft::sim::ptx {

// The integer or float that a constant expression comes to (PTX ISA 4.5.5).
struct Constant {
  bool is_float = false;
  bool is_single = false;
  bool is_unsigned = false;
  uint64_t bits = 0;
};

class Parser {
 public:
  static std::unique_ptr<Ast> parse(std::string_view text);

 private:
  explicit Parser(Ast& ast);

  // ---- tokens (parser.cpp)
  void advance();
  bool accept(std::string_view punctuation);
  bool accept_qualifier(std::string_view name);
  void expect(std::string_view punctuation);
  std::string_view identifier(const char* what);
  uint64_t unsigned_integer(const char* what);
  uint32_t small_integer(const char* what);
  [[noreturn]] void unexpected(const std::string& wanted) const;

  // ---- the module (parser.cpp)
  void module();
  void module_directive();
  void target();
  uint32_t file_index(uint64_t number);
  void file();
  void section();
  void alias();

  // ---- functions (parse_function.cpp)
  void function(bool is_entry, bool is_extern);
  std::vector<Variable> parameters();
  bool performance_directive(Function& function);
  void up_to_three(uint32_t* values, const char* what);
  void body(Function& function);
  void statement(Function& function);
  bool body_directive(Function& function);
  void labelled_directive(Function& function, std::string_view label, uint32_t line);
  void location(Function& function);
  void skip_prototype();

  // ---- variables (parse_variable.cpp)
  void variables(std::vector<Variable>& out, Storage storage, bool is_extern);
  void expand_numbered(std::vector<Variable>& out, Variable variable);
  Variable variable_type(Storage storage);
  Variable parameter();
  void declarator(Variable& variable);
  void array_dimensions(Variable& variable);
  void initialiser(Variable& variable);
  void initial_values(const Variable& variable, std::size_t dimension, uint64_t first,
                      uint64_t limit, uint64_t& used);
  InitialValue initial_value();
  void address_value(InitialValue& value);
  void attribute();

  // ---- instructions (parse_instruction.cpp)
  void instruction(Function& function);
  Node operand(int depth);
  Node name_operand();
  Node address_operand(int depth);
  Node constant_operand();
  Range operand_list(std::string_view close, int depth);
  Range store(const std::vector<Node>& nodes);

  // ---- constant expressions (constant_expression.cpp)
  Constant constant(int depth = 0);
  Constant binary(int precedence, int depth);
  Constant unary(int depth);
  int64_t constant_integer(const char* what);
  bool starts_constant() const;

  Ast& ast_;
  Lexer lexer_;
  Token token_, ahead_;
  std::string_view last_;             // the token before, for the end of an instruction's text
  std::vector<uint64_t> dimensions_;  // of the array being declared; the first is 0 where unsized
  std::unordered_map<uint64_t, uint32_t> file_index_;  // the text's file number -> Ast::files
  std::unordered_map<uint64_t, Location>
      call_sites_;  // of this function: hash of a .loc -> what it said
  int block_depth_ = 0;
  bool is_call_ = false;  // "(" opens a list of arguments, not an expression
};

}  // namespace fused_peft::sim::ptx
