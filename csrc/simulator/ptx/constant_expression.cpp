// Constant expressions, folded as C folds them: 64-bit integers, signed unless an operand is
// unsigned (PTX ISA 4.5.5).
#include <bit>
#include <limits>

#include "simulator/ptx/parser.h"

namespace fused_peft::sim::ptx {
namespace {

constexpr int kMaxDepth = 64;

struct Operator {
  const char* text;
  int precedence;
};
constexpr Operator kOperators[] = {{"||", 1}, {"&&", 2}, {"|", 3}, {"^", 4},  {"&", 5},  {"==", 6},
                                   {"!=", 6}, {"<", 7},  {">", 7}, {"<=", 7}, {">=", 7}, {"<<", 8},
                                   {">>", 8}, {"+", 9},  {"-", 9}, {"*", 10}, {"/", 10}, {"%", 10}};

int precedence_of(const Token& token) {
  if (token.kind != TokenKind::kPunctuation) return 0;
  for (const Operator& entry : kOperators) {
    if (token.text == entry.text) return entry.precedence;
  }
  return 0;
}

double as_double(const Constant& value) {
  if (!value.is_float) return value.is_unsigned ? double(value.bits) : double(int64_t(value.bits));
  return value.is_single ? double(std::bit_cast<float>(uint32_t(value.bits)))
                         : std::bit_cast<double>(value.bits);
}

Constant of_double(double value) { return {true, false, false, std::bit_cast<uint64_t>(value)}; }
Constant of_bool(bool value) { return {false, false, false, value}; }

Constant fold_floats(std::string_view op, double a, double b, uint32_t line) {
  if (op == "+") return of_double(a + b);
  if (op == "-") return of_double(a - b);
  if (op == "*") return of_double(a * b);
  if (op == "/") return of_double(a / b);
  if (op == "==") return of_bool(a == b);
  if (op == "!=") return of_bool(a != b);
  if (op == "<") return of_bool(a < b);
  if (op == ">") return of_bool(a > b);
  if (op == "<=") return of_bool(a <= b);
  if (op == ">=") return of_bool(a >= b);
  syntax_error(line, "operator '" + std::string(op) + "' has no floating-point form");
}

uint64_t divide(std::string_view op, uint64_t a, uint64_t b, bool is_unsigned, uint32_t line) {
  if (b == 0) syntax_error(line, "division by zero");
  if (is_unsigned) return op == "/" ? a / b : a % b;
  if (int64_t(b) == -1) return op == "/" ? -a : 0;
  return uint64_t(op == "/" ? int64_t(a) / int64_t(b) : int64_t(a) % int64_t(b));
}

Constant fold(std::string_view op, const Constant& x, const Constant& y, uint32_t line) {
  if (x.is_float || y.is_float) return fold_floats(op, as_double(x), as_double(y), line);
  const uint64_t a = x.bits, b = y.bits;
  const bool is_unsigned = x.is_unsigned || y.is_unsigned;
  const auto less = [&](uint64_t p, uint64_t q) {
    return is_unsigned ? p < q : int64_t(p) < int64_t(q);
  };
  if (op == "==") return of_bool(a == b);
  if (op == "!=") return of_bool(a != b);
  if (op == "<") return of_bool(less(a, b));
  if (op == ">") return of_bool(less(b, a));
  if (op == "<=") return of_bool(!less(b, a));
  if (op == ">=") return of_bool(!less(a, b));
  if (op == "&&") return of_bool(a && b);
  if (op == "||") return of_bool(a || b);
  Constant out{false, false, is_unsigned, 0};
  if (op == "+") out.bits = a + b;
  if (op == "-") out.bits = a - b;
  if (op == "*") out.bits = a * b;
  if (op == "&") out.bits = a & b;
  if (op == "|") out.bits = a | b;
  if (op == "^") out.bits = a ^ b;
  if (op == "/" || op == "%") out.bits = divide(op, a, b, is_unsigned, line);
  if (op == "<<" || op == ">>") {
    // A shift's type is its left operand's.
    out.is_unsigned = x.is_unsigned;
    const bool fill = op == ">>" && !x.is_unsigned && int64_t(a) < 0;
    if (b > 63) {
      out.bits = fill ? ~uint64_t{0} : 0;
    } else {
      out.bits = op == "<<" ? a << b : x.is_unsigned ? a >> b : uint64_t(int64_t(a) >> b);
    }
  }
  return out;
}

}  // namespace

bool Parser::starts_constant() const {
  switch (token_.kind) {
    case TokenKind::kInteger:
    case TokenKind::kFloat: return true;
    case TokenKind::kIdentifier: return token_.text == "WARP_SZ";
    case TokenKind::kPunctuation: break;
    default: return false;
  }
  if (token_.is("(")) {
    return ahead_.kind == TokenKind::kInteger || ahead_.kind == TokenKind::kFloat ||
           ahead_.is("(") || ahead_.is("-") || ahead_.is("+") || ahead_.is("~") || ahead_.is("!") ||
           ahead_.is_qualifier(".s64") || ahead_.is_qualifier(".u64") || ahead_.text == "WARP_SZ";
  }
  return token_.is("-") || token_.is("+") || token_.is("~") || token_.is("!");
}

int64_t Parser::constant_integer(const char* what) {
  if (!starts_constant()) unexpected(what);
  const uint32_t line = token_.line;
  const Constant value = constant();
  if (value.is_float)
    syntax_error(line, std::string("expected ") + what + ", found a floating-point number");
  return int64_t(value.bits);
}

Constant Parser::constant(int depth) {
  Constant condition = binary(1, depth);
  if (!accept("?")) return condition;
  if (condition.is_float) syntax_error(token_.line, "a floating-point condition");
  const Constant yes = constant(depth + 1);
  expect(":");
  const Constant no = constant(depth + 1);
  return condition.bits ? yes : no;
}

Constant Parser::binary(int precedence, int depth) {
  Constant left = unary(depth);
  for (;;) {
    const int own = precedence_of(token_);
    if (own < precedence || own == 0) return left;
    // "|" behind a constant may also pair two operands; a constant has to follow.
    const Token op = token_;
    advance();
    left = fold(op.text, left, binary(own + 1, depth), op.line);
  }
}

Constant Parser::unary(int depth) {
  if (depth > kMaxDepth) syntax_error(token_.line, "constant expression nested too deeply");
  const uint32_t line = token_.line;
  if (accept("-")) {
    Constant value = unary(depth + 1);
    const uint64_t sign = value.is_single ? uint64_t{1} << 31 : uint64_t{1} << 63;
    value.bits = value.is_float ? value.bits ^ sign : -value.bits;
    return value;
  }
  if (accept("+")) return unary(depth + 1);
  if (token_.is("~") || token_.is("!")) {
    const bool invert = token_.is("~");
    advance();
    Constant value = unary(depth + 1);
    if (value.is_float) syntax_error(line, "operator has no floating-point form");
    return invert ? Constant{false, false, value.is_unsigned, ~value.bits} : of_bool(!value.bits);
  }
  if (accept("(")) {
    if (token_.is_qualifier(".s64") || token_.is_qualifier(".u64")) {
      const bool is_unsigned = token_.is_qualifier(".u64");
      advance();
      expect(")");
      Constant value = unary(depth + 1);
      if (value.is_float) syntax_error(line, "a cast of a floating-point number");
      value.is_unsigned = is_unsigned;
      return value;
    }
    const Constant value = constant(depth + 1);
    expect(")");
    return value;
  }
  if (token_.kind == TokenKind::kIdentifier && token_.text == "WARP_SZ") {
    advance();
    return {false, false, false, uint64_t(kLanes)};
  }
  if (token_.kind != TokenKind::kInteger && token_.kind != TokenKind::kFloat)
    unexpected("a constant");
  const Constant value{token_.kind == TokenKind::kFloat, token_.is_single, token_.is_unsigned,
                       token_.bits};
  advance();
  return value;
}

}  // namespace fused_peft::sim::ptx
