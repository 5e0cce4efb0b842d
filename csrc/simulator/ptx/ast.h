// What a PTX module says, before any of it is decoded. Names are views into Ast::text.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "simulator/core/types.h"

namespace fused_peft::sim::ptx {

// A stretch of one of the Ast's vectors.
struct Range {
  uint32_t first = 0;
  uint32_t count = 0;
};

enum class NodeKind : uint8_t {
  kName,     // %r1  !%p1  %v.x  %tid.x  sym  sym+8  L1
  kInteger,  // a constant expression, folded
  kFloat,
  kVector,   // {a, b}: children
  kAddress,  // [a+8] or [map, {x, y}]: children, the first with its offset in `value`
  kList,     // (a, b) of a call: children
};

struct Node {
  NodeKind kind = NodeKind::kName;
  bool negated = false;    // "!" before a predicate
  bool paired = false;     // "|" behind it: the second destination is the next node
  bool is_single = false;  // of kFloat: `value` holds 32 bits
  bool indexed = false;    // array[2]: `value` counts elements
  char component = 0;      // of kName: 'x' 'y' 'z' 'w', 'r' 'g' 'b' 'a' turned into these
  uint32_t line = 0;
  Range children;  // in Ast::nodes
  std::string_view name;
  int64_t value = 0;  // of kInteger; bits of kFloat; offset of kName and kAddress
};

struct Instruction {
  std::string_view opcode;  // up to the first dot
  Range qualifiers;         // in Ast::names, dots included
  Range operands;           // in Ast::nodes
  std::string_view guard;   // "" without one
  bool guard_negated = false;
  uint32_t line = 0;
  std::string_view text;  // guard to the last operand, as written
};

enum class Storage : uint8_t { kReg, kGlobal, kConst, kShared, kLocal, kParam };

// One value of an initialiser.
struct InitialValue {
  enum class Kind : uint8_t { kInteger, kFloat, kAddress };
  Kind kind = Kind::kInteger;
  bool is_single = false;
  uint64_t element = 0;     // the scalar it fills, counted from the variable's start
  uint64_t bits = 0;        // integer, or float
  std::string_view symbol;  // of kAddress
  int64_t addend = 0;
  uint64_t mask =
      0;  // 0xFF00(symbol): the bits of the address that are taken, shifted down; 0: all
  uint32_t line = 0;
};

struct Variable {
  Storage storage = Storage::kReg;
  Type type = Type::kNone;  // kNone: opaque (.texref, .samplerref, .surfref)
  bool is_array = false;    // an unsized one has elements 0
  bool is_extern = false;
  uint8_t vector = 1;     // .v2 .v4
  uint32_t align = 0;     // bytes; the type's own where the text has none
  uint32_t numbered = 0;  // of "%r<10>": 10
  uint64_t elements = 1;  // of all dimensions
  uint32_t line = 0;
  std::string_view name;
  Range initial;  // in Ast::initial_values
  bool has_initial = false;

  uint64_t element_bytes() const { return uint64_t(bytes_of(type)) * vector; }
  uint64_t bytes() const { return element_bytes() * elements; }
};

struct Location {
  uint32_t file = 0, line = 0;                // index into Ast::files
  uint32_t caller_file = 0, caller_line = 0;  // the outermost call where it is inlined, else 0
};

enum class StatementKind : uint8_t {
  kInstruction,  // index into Ast::instructions
  kVariable,     // index into Ast::variables
  kLocation,     // index into Ast::locations
  kOpen,         // {
  kClose,        // }
  kLabel,        // name
  kTargets,      // name: .branchtargets or .calltargets; index into Ast::target_lists
  kPrototype,    // name: .callprototype; nothing of it is needed without indirect calls
};

struct Statement {
  StatementKind kind;
  uint32_t line = 0;
  uint32_t index = 0;
  std::string_view name;
};

struct Function {
  bool is_entry = false;
  bool is_extern = false;
  bool has_body = false;
  bool noreturn = false;
  uint32_t line = 0;
  std::string_view name;
  std::vector<Variable> returns, params;
  std::vector<Statement> body;
  // Performance directives; 0 where absent.
  uint32_t max_threads[3] = {0, 0, 0};
  uint32_t required_threads[3] = {0, 0, 0};
  uint32_t required_cluster[3] = {0, 0, 0};
  bool explicit_cluster = false;
  uint32_t max_registers = 0;
};

struct Ast {
  std::string text;
  uint32_t target_sm = 0;
  bool arch_specific = false;             // sm_90a
  std::vector<std::string> files = {""};  // [0]: not known
  std::vector<Function> functions;        // definitions and declarations, in the order of the text
  std::vector<Variable> module_variables;
  std::map<std::string_view, std::string_view> aliases;

  std::vector<Variable> variables;  // of function bodies
  std::vector<Instruction> instructions;
  std::vector<Node> nodes;
  std::vector<std::string_view> names;
  std::vector<Location> locations;
  std::vector<Range> target_lists;  // in names
  std::vector<InitialValue> initial_values;
  std::deque<std::string> made_names;  // of numbered variables
};

}  // namespace fused_peft::sim::ptx
