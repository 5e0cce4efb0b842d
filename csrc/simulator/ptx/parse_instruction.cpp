// Instructions and their operands (PTX ISA 6.4).
#include <utility>

#include "simulator/ptx/parser.h"

namespace fused_peft::sim::ptx {
namespace {

constexpr int kMaxOperandDepth = 8;

char component_of(std::string_view qualifier) {
  if (qualifier.size() != 2) return 0;
  switch (qualifier[1]) {
    case 'x':
    case 'r': return 'x';
    case 'y':
    case 'g': return 'y';
    case 'z':
    case 'b': return 'z';
    case 'w':
    case 'a': return 'w';
    default: return 0;
  }
}

}  // namespace

Range Parser::store(const std::vector<Node>& nodes) {
  const Range range{uint32_t(ast_.nodes.size()), uint32_t(nodes.size())};
  ast_.nodes.insert(ast_.nodes.end(), nodes.begin(), nodes.end());
  return range;
}

// @!%p1 add.s32 %r1, %r2, 4;
void Parser::instruction(Function& function) {
  Instruction instruction;
  instruction.line = token_.line;
  const char* start = token_.text.data();
  if (accept("@")) {
    instruction.guard_negated = accept("!");
    instruction.guard = identifier("a predicate");
  }
  instruction.opcode = identifier("an instruction");
  is_call_ = instruction.opcode == "call";
  instruction.qualifiers.first = uint32_t(ast_.names.size());
  while (token_.kind == TokenKind::kQualifier) {
    ast_.names.push_back(token_.text);
    ++instruction.qualifiers.count;
    advance();
  }
  instruction.operands = operand_list(";", 0);
  instruction.text = std::string_view(start, std::size_t(last_.data() - start));
  function.body.push_back(
      {StatementKind::kInstruction, instruction.line, uint32_t(ast_.instructions.size()), {}});
  ast_.instructions.push_back(instruction);
}

// Up to and including `close`. Commas part the operands; "|" pairs two of them.
Range Parser::operand_list(std::string_view close, int depth) {
  std::vector<Node> nodes;
  if (accept(close)) return {};
  for (;;) {
    nodes.push_back(operand(depth));
    if (accept("|")) {
      nodes.back().paired = true;
    } else if (!accept(",")) {
      break;
    }
  }
  expect(close);
  return store(nodes);
}

Node Parser::operand(int depth) {
  if (depth > kMaxOperandDepth) syntax_error(token_.line, "operands nested too deeply");
  Node node;
  node.line = token_.line;
  if (accept("{")) {
    node.kind = NodeKind::kVector;
    node.children = operand_list("}", depth + 1);
  } else if (token_.is("[")) {
    node = address_operand(depth);
  } else if (token_.is("(") && (is_call_ || !starts_constant())) {
    advance();
    node.kind = NodeKind::kList;
    node.children = operand_list(")", depth + 1);
  } else if ((token_.is("!") && ahead_.kind == TokenKind::kIdentifier &&
              ahead_.text != "WARP_SZ") ||
             (token_.kind == TokenKind::kIdentifier && token_.text != "WARP_SZ")) {
    node = name_operand();
  } else {
    node = constant_operand();
  }
  return node;
}

Node Parser::constant_operand() {
  Node node;
  node.line = token_.line;
  if (!starts_constant()) unexpected("an operand");
  const Constant value = constant();
  node.kind = value.is_float ? NodeKind::kFloat : NodeKind::kInteger;
  node.is_single = value.is_single;
  node.value = int64_t(value.bits);
  return node;
}

// %r1   !%p1   %v.x   sym+8   array[2]
Node Parser::name_operand() {
  Node node;
  node.line = token_.line;
  node.negated = accept("!");
  node.name = identifier("a name");
  if (token_.kind == TokenKind::kQualifier && token_.glued) {
    node.component = component_of(token_.text);
    if (!node.component) unexpected("a component .x .y .z .w");
    advance();
  }
  if (token_.is("+") || token_.is("-")) {
    node.value = constant_integer("an offset");
  } else if (accept("[")) {
    node.indexed = true;
    node.value = constant_integer("an index");
    expect("]");
  }
  return node;
}

// [%rd1]  [%rd1+-4]  [sym+8]  [16]  [map, {%r1, %r2}]
Node Parser::address_operand(int depth) {
  Node node;
  node.line = token_.line;
  node.kind = NodeKind::kAddress;
  expect("[");
  std::vector<Node> parts;
  do {
    parts.push_back(operand(depth + 1));
    if (parts.size() > 1) continue;
    Node& base = parts.front();
    if (base.kind != NodeKind::kName && base.kind != NodeKind::kInteger) {
      syntax_error(base.line, "an address starts with a register, a symbol or a number");
    }
    if (base.indexed) syntax_error(base.line, "an index inside of an address");
    if (base.kind == NodeKind::kName) node.value = std::exchange(base.value, 0);
  } while (accept(","));
  expect("]");
  node.children = store(parts);
  return node;
}

}  // namespace fused_peft::sim::ptx
