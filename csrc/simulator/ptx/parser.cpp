#include "simulator/ptx/parser.h"

#include <charconv>

#include "simulator/core/errors.h"

namespace fused_peft::sim::ptx {

Parser::Parser(Ast& ast) : ast_(ast), lexer_(ast.text) {
  token_ = lexer_.next();
  ahead_ = lexer_.next();
}

std::unique_ptr<Ast> Parser::parse(std::string_view text) {
  auto ast = std::make_unique<Ast>();
  // A file read whole may end in the zero that C strings have.
  while (!text.empty() && text.back() == '\0') text.remove_suffix(1);
  ast->text = text;
  Parser(*ast).module();
  return ast;
}

void Parser::advance() {
  last_ = token_.text;
  token_ = ahead_;
  ahead_ = lexer_.next();
}

bool Parser::accept(std::string_view punctuation) {
  if (!token_.is(punctuation)) return false;
  advance();
  return true;
}

bool Parser::accept_qualifier(std::string_view name) {
  if (!token_.is_qualifier(name)) return false;
  advance();
  return true;
}

void Parser::expect(std::string_view punctuation) {
  if (!accept(punctuation)) unexpected("'" + std::string(punctuation) + "'");
}

std::string_view Parser::identifier(const char* what) {
  if (token_.kind != TokenKind::kIdentifier) unexpected(what);
  const std::string_view name = token_.text;
  advance();
  return name;
}

uint64_t Parser::unsigned_integer(const char* what) {
  if (token_.kind != TokenKind::kInteger) unexpected(what);
  const uint64_t value = token_.bits;
  advance();
  return value;
}

uint32_t Parser::small_integer(const char* what) {
  const uint32_t line = token_.line;
  const uint64_t value = unsigned_integer(what);
  if (value > 0x7fffffff)
    syntax_error(line, std::string(what) + " is too large: " + std::to_string(value));
  return uint32_t(value);
}

void Parser::unexpected(const std::string& wanted) const {
  const std::string found = token_.kind == TokenKind::kEnd
                                ? "the end of the text"
                                : "'" + std::string(token_.text.substr(0, 60)) + "'";
  syntax_error(token_.line, "expected " + wanted + ", found " + found);
}

void Parser::module() {
  if (!accept_qualifier(".version")) unexpected(".version as the first directive");
  if (token_.kind != TokenKind::kFloat) unexpected("a version number such as 9.0");
  advance();
  target();
  if (accept_qualifier(".address_size") && unsigned_integer("64") != 64) {
    throw Unsupported("PTX line " + std::to_string(token_.line) + ": .address_size 32");
  }
  while (token_.kind != TokenKind::kEnd) module_directive();
}

void Parser::target() {
  if (!accept_qualifier(".target")) unexpected(".target");
  do {
    const uint32_t line = token_.line;
    const std::string_view name = identifier("a target such as sm_80");
    if (!name.starts_with("sm_")) {
      if (name == "map_f64_to_f32")
        throw Unsupported("PTX line " + std::to_string(line) + ": .target map_f64_to_f32");
      continue;  // debug, texmode_unified, texmode_independent: nothing that a thread could see
    }
    const auto [end, error] =
        std::from_chars(name.data() + 3, name.data() + name.size(), ast_.target_sm);
    const std::string_view rest(end, std::size_t(name.data() + name.size() - end));
    if (error != std::errc() || !(rest.empty() || rest == "a" || rest == "f")) {
      syntax_error(line, "unknown target '" + std::string(name) + "'");
    }
    ast_.arch_specific = !rest.empty();
  } while (accept(","));
  if (ast_.target_sm == 0) syntax_error(token_.line, ".target names no sm_NN");
}

// A .loc may come before the .file that it names.
uint32_t Parser::file_index(uint64_t number) {
  const auto [place, is_new] = file_index_.try_emplace(number, uint32_t(ast_.files.size()));
  if (is_new) ast_.files.emplace_back();
  return place->second;
}

void Parser::file() {
  const uint64_t number = unsigned_integer("a file number");
  if (token_.kind != TokenKind::kString) unexpected("a file name in quotes");
  ast_.files[file_index(number)] = token_.text;
  advance();
  while (accept(",")) unsigned_integer("the file's time stamp or size");
}

void Parser::section() {
  if (token_.kind != TokenKind::kQualifier && token_.kind != TokenKind::kIdentifier)
    unexpected("a section's name");
  if (!ahead_.is("{")) {
    advance();
    unexpected("'{'");
  }
  lexer_.skip_section();
  token_ = lexer_.next();
  ahead_ = lexer_.next();
}

void Parser::alias() {
  const std::string_view name = identifier("an alias");
  expect(",");
  ast_.aliases[name] = identifier("a function's name");
  expect(";");
}

void Parser::module_directive() {
  if (accept(";")) return;
  if (accept_qualifier(".file")) return file();
  if (accept_qualifier(".section")) return section();
  if (accept_qualifier(".alias")) return alias();
  if (accept_qualifier(".pragma")) {
    while (token_.kind == TokenKind::kString || token_.is(",")) advance();
    return expect(";");
  }
  bool is_extern = false;
  for (;;) {
    if (accept_qualifier(".extern")) {
      is_extern = true;
    } else if (!accept_qualifier(".visible") && !accept_qualifier(".weak") &&
               !accept_qualifier(".common")) {
      break;
    }
  }
  if (accept_qualifier(".entry")) return function(true, is_extern);
  if (accept_qualifier(".func")) return function(false, is_extern);
  for (auto [name, storage] : {std::pair{".global", Storage::kGlobal},
                               {".const", Storage::kConst},
                               {".shared", Storage::kShared}}) {
    if (accept_qualifier(name)) return variables(ast_.module_variables, storage, is_extern);
  }
  if (token_.is_qualifier(".tex") || token_.is_qualifier(".local") || token_.is_qualifier(".reg") ||
      token_.is_qualifier(".param")) {
    throw Unsupported("PTX line " + std::to_string(token_.line) + ": " + std::string(token_.text) +
                      " at module scope");
  }
  unexpected("a module directive");
}

}  // namespace fused_peft::sim::ptx
