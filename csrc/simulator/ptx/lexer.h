// PTX text -> tokens (PTX ISA 4.2-4.5).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace fused_peft::sim::ptx {

enum class TokenKind : uint8_t {
  kEnd,
  kIdentifier,   // add  %r1  $L__BB0_1  _
  kQualifier,    // .global  .L1::no_allocate  .2d
  kInteger,      // 12  0x1F  017  0b101  12U
  kFloat,        // 0f3F800000  0d3FF0000000000000  1.5e3
  kString,       // text without the quotes
  kPunctuation,  // one character, or one of << >> <= >= == != && ||
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  bool glued = false;        // nothing between it and the token before
  bool is_unsigned = false;  // of an integer: suffix U, or more than 63 bits
  bool is_single =
      false;          // of a float: 0f, `bits` are those of a 32-bit float; else of a 64-bit one
  uint32_t line = 0;  // from 1 on
  uint64_t bits = 0;
  std::string_view text;

  bool is(std::string_view punctuation) const {
    return kind == TokenKind::kPunctuation && text == punctuation;
  }
  bool is_qualifier(std::string_view name) const {
    return kind == TokenKind::kQualifier && text == name;
  }
};

// Throws SyntaxError "PTX line 12: what".
[[noreturn]] void syntax_error(uint32_t line, const std::string& what);

class Lexer {
 public:
  // The text must outlive the tokens.
  explicit Lexer(std::string_view text) : text_(text) {}

  Token next();
  // Goes on behind the next "}": the contents of a .section, which are data for debuggers.
  void skip_section();

 private:
  void skip_blanks();
  void skip_block_comment();
  Token word(Token token);
  Token qualifier(Token token);
  Token number(Token token);
  Token bit_pattern(Token token, std::size_t digits);
  Token decimal_float(Token token, std::size_t end);
  Token string(Token token);
  Token punctuation(Token token);
  Token finish(Token token, TokenKind kind, std::size_t end);
  char at(std::size_t position) const { return position < text_.size() ? text_[position] : '\0'; }

  std::string_view text_;
  std::size_t position_ = 0;
  uint32_t line_ = 1;
};

}  // namespace fused_peft::sim::ptx
