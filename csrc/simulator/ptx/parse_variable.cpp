// Variable declarations and initialisers (PTX ISA 5.4).
#include "simulator/core/errors.h"
#include "simulator/ptx/parser.h"

namespace fused_peft::sim::ptx {
namespace {

constexpr uint64_t kMaxElements = uint64_t{1} << 40;
constexpr uint32_t kMaxAlign = 1u << 20;
constexpr uint32_t kMaxNumbered = 4096;

bool is_opaque(std::string_view type) {
  return type == ".texref" || type == ".samplerref" || type == ".surfref";
}

}  // namespace

// .attribute(.managed, .unified(19, 95))
void Parser::attribute() {
  expect("(");
  do {
    if (token_.kind != TokenKind::kQualifier) unexpected("an attribute");
    advance();
    if (accept("(")) {
      do {
        unsigned_integer("a number");
      } while (accept(","));
      expect(")");
    }
  } while (accept(","));
  expect(")");
}

// .align 8 .v2 .f32, in any order before the name.
Variable Parser::variable_type(Storage storage) {
  Variable variable;
  variable.storage = storage;
  variable.line = token_.line;
  bool typed = false;
  while (token_.kind == TokenKind::kQualifier) {
    const Type type = type_from_name(token_.text.data(), int(token_.text.size()));
    if (accept_qualifier(".align")) {
      variable.align = small_integer("an alignment");
      if (variable.align == 0 || variable.align & (variable.align - 1) ||
          variable.align > kMaxAlign) {
        syntax_error(variable.line,
                     "alignment is no power of two: " + std::to_string(variable.align));
      }
    } else if (accept_qualifier(".ptr")) {  // .param .u64 .ptr .global .align 16 name
      while (accept_qualifier(".const") || accept_qualifier(".global") ||
             accept_qualifier(".local") || accept_qualifier(".shared")) {
      }
      if (accept_qualifier(".align")) small_integer("an alignment");
    } else if (accept_qualifier(".attribute")) {
      attribute();
    } else if (accept_qualifier(".v2")) {
      variable.vector = 2;
    } else if (accept_qualifier(".v4")) {
      variable.vector = 4;
    } else if (accept_qualifier(".v8")) {
      variable.vector = 8;
    } else if (!typed && (type != Type::kNone || is_opaque(token_.text))) {
      variable.type = type;
      typed = true;
      advance();
    } else {
      unexpected("a type");
    }
  }
  if (!typed) unexpected("a type");
  if (variable.type == Type::kPred && storage != Storage::kReg) {
    syntax_error(variable.line, "a predicate lives in a register only");
  }
  if (variable.align == 0)
    variable.align = uint32_t(std::max<uint64_t>(1, variable.element_bytes()));
  return variable;
}

Variable Parser::parameter() {
  Storage storage = Storage::kParam;
  if (accept_qualifier(".reg")) {
    storage = Storage::kReg;
  } else if (!accept_qualifier(".param")) {
    unexpected(".param or .reg");
  }
  Variable variable = variable_type(storage);
  declarator(variable);
  return variable;
}

void Parser::array_dimensions(Variable& variable) {
  dimensions_.clear();
  while (accept("[")) {
    uint64_t size = 0;
    if (!token_.is("]")) {
      const int64_t value = constant_integer("an array's size");
      if (value < 0) syntax_error(token_.line, "negative array size");
      size = uint64_t(value);
    } else if (!dimensions_.empty()) {
      unexpected("the size of an inner dimension");
    }
    expect("]");
    dimensions_.push_back(size);
    variable.elements = variable.is_array ? variable.elements : 1;
    variable.is_array = true;
    if (size && variable.elements > kMaxElements / size)
      syntax_error(variable.line, "array too large");
    variable.elements *= size;
  }
}

// name   name[4][2]   name<10>
void Parser::declarator(Variable& variable) {
  variable.line = token_.line;
  variable.name = identifier("a name");
  if (accept("<")) {
    variable.numbered = small_integer("a number of registers");
    expect(">");
  }
  array_dimensions(variable);
  if (variable.is_array && variable.storage == Storage::kReg) {
    syntax_error(variable.line, "registers have no arrays");
  }
}

void Parser::variables(std::vector<Variable>& out, Storage storage, bool is_extern) {
  if (storage == Storage::kConst && accept("[")) {  // .const[2]: banks of old
    unsigned_integer("a bank");
    expect("]");
  }
  const Variable shared = variable_type(storage);
  do {
    Variable variable = shared;
    variable.is_extern = is_extern;
    declarator(variable);
    if (accept("=")) initialiser(variable);
    if (variable.numbered && storage != Storage::kReg) {
      expand_numbered(out, variable);
    } else {
      out.push_back(variable);
    }
  } while (accept(","));
  expect(";");
}

// ".param .b32 x<3>" is x0, x1 and x2. (Registers come by the thousand and are made when they are
// used.)
void Parser::expand_numbered(std::vector<Variable>& out, Variable variable) {
  if (variable.numbered > kMaxNumbered)
    syntax_error(variable.line, "too many variables in a numbered set");
  const std::string prefix(variable.name);
  for (uint32_t i = 0; i < variable.numbered; ++i) {
    variable.name = ast_.made_names.emplace_back(prefix + std::to_string(i));
    out.push_back(variable);
  }
}

void Parser::initialiser(Variable& variable) {
  if (variable.storage != Storage::kGlobal && variable.storage != Storage::kConst) {
    syntax_error(variable.line, "only .global and .const variables have an initialiser");
  }
  if (variable.type == Type::kNone) {
    throw Unsupported("PTX line " + std::to_string(variable.line) +
                      ": initialised texture or sampler");
  }
  variable.has_initial = true;
  variable.initial.first = uint32_t(ast_.initial_values.size());
  if (variable.vector > 1) dimensions_.push_back(variable.vector);
  if (token_.is("{")) {
    const bool unsized = variable.is_array && dimensions_[0] == 0;
    const uint64_t limit = unsized ? kMaxElements : variable.elements * variable.vector;
    uint64_t used = 0;
    initial_values(variable, 0, 0, limit, used);
    if (unsized) {
      uint64_t row = 1;
      for (std::size_t i = 1; i < dimensions_.size(); ++i) row *= dimensions_[i];
      if (row == 0) syntax_error(variable.line, "array of empty rows");
      variable.elements = (used + row - 1) / row * row / variable.vector;
    }
  } else {
    if (variable.is_array) unexpected("'{'");
    ast_.initial_values.push_back(initial_value());
  }
  variable.initial.count = uint32_t(ast_.initial_values.size()) - variable.initial.first;
}

// The values from one brace to its closing one: dimension `dimension`, which starts at scalar
// `first` and ends before `limit`. `used` becomes the end of what has been filled.
void Parser::initial_values(const Variable& variable, std::size_t dimension, uint64_t first,
                            uint64_t limit, uint64_t& used) {
  if (dimension > dimensions_.size())
    syntax_error(token_.line, "initialiser nested more deeply than its variable");
  uint64_t row = 1;
  for (std::size_t i = dimension + 1; i < dimensions_.size(); ++i) row *= dimensions_[i];
  uint64_t next = first;
  expect("{");
  while (!token_.is("}")) {
    if (next >= limit)
      syntax_error(token_.line, "more values than '" + std::string(variable.name) + "' holds");
    if (token_.is("{")) {
      initial_values(variable, dimension + 1, next, std::min(limit, next + row), used);
      next += row;
    } else {
      if (dimension + 1 < dimensions_.size()) unexpected("'{' of an inner dimension");
      ast_.initial_values.push_back(initial_value());
      ast_.initial_values.back().element = next++;
    }
    used = std::max(used, next);
    if (!accept(",")) break;
    if (token_.is("}")) unexpected("a value");
  }
  expect("}");
}

// 12   0f3F800000   -5   x   x+8   generic(x)+8   0xFF00(x)
InitialValue Parser::initial_value() {
  InitialValue value;
  value.line = token_.line;
  if (token_.kind == TokenKind::kIdentifier && token_.text != "WARP_SZ") {
    address_value(value);
    return value;
  }
  if (token_.kind == TokenKind::kInteger && ahead_.is("(")) {
    value.mask = token_.bits;
    advance();
    advance();
    address_value(value);
    expect(")");
    if (value.mask == 0) syntax_error(value.line, "mask 0 of an address");
    return value;
  }
  const Constant constant_value = constant();
  value.kind = constant_value.is_float ? InitialValue::Kind::kFloat : InitialValue::Kind::kInteger;
  value.is_single = constant_value.is_single;
  value.bits = constant_value.bits;
  return value;
}

void Parser::address_value(InitialValue& value) {
  value.kind = InitialValue::Kind::kAddress;
  value.symbol = identifier("a variable's name");
  if (value.symbol == "generic" && accept("(")) {
    value.symbol = identifier("a variable's name");
    if (token_.is("+") || token_.is("-")) value.addend = constant_integer("an offset");
    expect(")");
  }
  if (token_.is("+") || token_.is("-")) {
    value.addend = int64_t(uint64_t(value.addend) + uint64_t(constant_integer("an offset")));
  }
}

}  // namespace fused_peft::sim::ptx
