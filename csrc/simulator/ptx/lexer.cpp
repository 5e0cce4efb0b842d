#include "simulator/ptx/lexer.h"

#include <array>
#include <bit>
#include <charconv>
#include <cstdlib>

#include "simulator/core/errors.h"

namespace fused_peft::sim::ptx {
namespace {

// The locale's isalpha and its negative arguments are no use here.
enum CharClass : uint8_t { kOther = 0, kLetter = 1, kDigit = 2, kHex = 4, kBlank = 8 };

constexpr std::array<uint8_t, 256> make_classes() {
  std::array<uint8_t, 256> classes{};
  for (int c = 'a'; c <= 'z'; ++c) classes[c] = classes[c - 'a' + 'A'] = kLetter;
  for (int c = '0'; c <= '9'; ++c) classes[c] = kDigit | kHex;
  for (int c = 'a'; c <= 'f'; ++c) classes[c] = classes[c - 'a' + 'A'] = kLetter | kHex;
  classes['_'] = classes['$'] = classes['%'] = kLetter;
  for (char c : {' ', '\t', '\r', '\n', '\f', '\v'}) classes[uint8_t(c)] = kBlank;
  return classes;
}
constexpr std::array<uint8_t, 256> kClasses = make_classes();

bool is(char c, uint8_t char_class) { return kClasses[uint8_t(c)] & char_class; }

}  // namespace

void syntax_error(uint32_t line, const std::string& what) {
  throw SyntaxError("PTX line " + std::to_string(line) + ": " + what);
}

void Lexer::skip_block_comment() {
  const uint32_t start = line_;
  const std::size_t end = text_.find("*/", position_ + 2);
  if (end == std::string_view::npos) syntax_error(start, "comment without an end");
  for (; position_ < end; ++position_) line_ += text_[position_] == '\n';
  position_ = end + 2;
}

void Lexer::skip_blanks() {
  for (; position_ < text_.size(); ++position_) {
    const char c = text_[position_];
    if (c == '\n') {
      ++line_;
    } else if (c == '/' && at(position_ + 1) == '*') {
      skip_block_comment();
      --position_;
    } else if ((c == '/' && at(position_ + 1) == '/') ||
               (c == '#' && (position_ == 0 || text_[position_ - 1] == '\n'))) {
      position_ =
          std::min(text_.find('\n', position_), text_.size()) - 1;  // a C preprocessor's line too
    } else if (!is(c, kBlank)) {
      return;
    }
  }
}

void Lexer::skip_section() {
  while (position_ < text_.size()) {
    const char c = text_[position_++];
    if (c == '\n') ++line_;
    if (c == '}') return;
  }
  syntax_error(line_, ".section without its closing brace");
}

Token Lexer::finish(Token token, TokenKind kind, std::size_t end) {
  token.kind = kind;
  token.text = text_.substr(position_, end - position_);
  position_ = end;
  return token;
}

Token Lexer::next() {
  const std::size_t before = position_;
  skip_blanks();
  Token token;
  token.line = line_;
  token.glued = position_ == before;
  if (position_ >= text_.size()) return token;
  const char c = text_[position_];
  if (is(c, kDigit)) return number(token);
  const bool remainder = c == '%' && !is(at(position_ + 1), kLetter | kDigit);
  if (is(c, kLetter) && !remainder) return word(token);
  // ".5" is a number, the ".2d" of an opcode's qualifiers stands right behind a word.
  const bool behind_word = position_ > 0 && is(text_[position_ - 1], kLetter | kDigit);
  if (c == '.' && is(at(position_ + 1), kDigit) && !behind_word)
    return decimal_float(token, position_);
  if (c == '.' && is(at(position_ + 1), kLetter | kDigit)) return qualifier(token);
  if (c == '"') return string(token);
  return punctuation(token);
}

Token Lexer::word(Token token) {
  std::size_t end = position_ + 1;
  while (is(at(end), kLetter | kDigit) && at(end) != '%') ++end;
  return finish(token, TokenKind::kIdentifier, end);
}

Token Lexer::qualifier(Token token) {
  std::size_t end = position_ + 1;
  for (;;) {
    if (is(at(end), kLetter | kDigit) && at(end) != '%' && at(end) != '$') {
      ++end;
    } else if (at(end) == ':' && at(end + 1) == ':') {
      end += 2;
    } else {
      return finish(token, TokenKind::kQualifier, end);
    }
  }
}

Token Lexer::bit_pattern(Token token, std::size_t digits) {
  const std::size_t start = position_ + 2;
  std::size_t end = start;
  while (is(at(end), kHex)) ++end;
  if (end - start != digits || is(at(end), kLetter)) {
    syntax_error(line_, "a floating-point bit pattern needs " + std::to_string(digits) +
                            " hexadecimal digits: '" +
                            std::string(text_.substr(position_, end - position_)) + "'");
  }
  std::from_chars(text_.data() + start, text_.data() + end, token.bits, 16);
  token.is_single = digits == 8;
  return finish(token, TokenKind::kFloat, end);
}

Token Lexer::decimal_float(Token token, std::size_t end) {
  if (at(end) == '.') {
    ++end;
    while (is(at(end), kDigit)) ++end;
  }
  if (at(end) == 'e' || at(end) == 'E') {
    std::size_t exponent = end + 1;
    if (at(exponent) == '+' || at(exponent) == '-') ++exponent;
    if (!is(at(exponent), kDigit)) syntax_error(line_, "exponent without digits");
    while (is(at(exponent), kDigit)) ++exponent;
    end = exponent;
  }
  double value = 0;
  // Out of range leaves 0 or needs the sign of the exponent: strtod knows both.
  const std::string digits(text_.substr(position_, end - position_));
  value = std::strtod(digits.c_str(), nullptr);
  token.bits = std::bit_cast<uint64_t>(value);
  return finish(token, TokenKind::kFloat, end);
}

Token Lexer::number(Token token) {
  const char second = at(position_ + 1) | 0x20;
  int base = 10;
  std::size_t start = position_;
  if (text_[position_] == '0') {
    if (second == 'f') return bit_pattern(token, 8);
    if (second == 'd') return bit_pattern(token, 16);
    if (second == 'x') base = 16, start += 2;
    if (second == 'b') base = 2, start += 2;
    if (is(at(position_ + 1), kDigit)) base = 8, start += 1;
  }
  std::size_t end = start;
  while (is(at(end), base == 16 ? kHex : kDigit)) ++end;
  const bool fraction = at(end) == '.' && !is(at(end + 1), kLetter);
  if (base == 8 && fraction) base = 10, start = position_;
  if (base == 10 && (fraction || (at(end) | 0x20) == 'e')) return decimal_float(token, end);
  const auto [stop, error] =
      std::from_chars(text_.data() + start, text_.data() + end, token.bits, base);
  const std::string_view digits = text_.substr(position_, end - position_);
  if (error == std::errc::result_out_of_range) {
    syntax_error(line_, "integer of more than 64 bits: '" + std::string(digits) + "'");
  }
  if (error != std::errc() || stop != text_.data() + end) {
    syntax_error(line_, "not a number: '" + std::string(digits) + "'");
  }
  token.is_unsigned = token.bits >> 63;
  if (at(end) == 'U') {
    token.is_unsigned = true;
    ++end;
  }
  if (is(at(end), kLetter)) {
    syntax_error(line_, "letter behind a number: '" +
                            std::string(text_.substr(position_, end + 1 - position_)) + "'");
  }
  return finish(token, TokenKind::kInteger, end);
}

Token Lexer::string(Token token) {
  std::size_t end = position_ + 1;
  while (end < text_.size() && text_[end] != '"' && text_[end] != '\n') {
    end += text_[end] == '\\' ? 2 : 1;
  }
  if (at(end) != '"') syntax_error(line_, "string without an end");
  token.kind = TokenKind::kString;
  token.text = text_.substr(position_ + 1, end - position_ - 1);
  position_ = end + 1;
  return token;
}

Token Lexer::punctuation(Token token) {
  const std::string_view two = text_.substr(position_, 2);
  for (std::string_view pair : {"<<", ">>", "<=", ">=", "==", "!=", "&&", "||"}) {
    if (two == pair) return finish(token, TokenKind::kPunctuation, position_ + 2);
  }
  return finish(token, TokenKind::kPunctuation, position_ + 1);
}

}  // namespace fused_peft::sim::ptx
