// Functions and the statements of their bodies.
#include "simulator/ptx/parser.h"

namespace fused_peft::sim::ptx {
namespace {

constexpr int kMaxBlockDepth = 256;

}  // namespace

std::vector<Variable> Parser::parameters() {
  std::vector<Variable> out;
  expect("(");
  if (accept(")")) return out;
  do {
    out.push_back(parameter());
  } while (accept(","));
  expect(")");
  return out;
}

void Parser::up_to_three(uint32_t* values, const char* what) {
  int count = 0;
  values[0] = values[1] = values[2] = 1;
  do {
    if (count == 3) unexpected("no more than three numbers");
    values[count++] = small_integer(what);
  } while (accept(","));
}

bool Parser::performance_directive(Function& function) {
  if (accept_qualifier(".maxntid")) {
    up_to_three(function.max_threads, "a number of threads");
  } else if (accept_qualifier(".reqntid")) {
    up_to_three(function.required_threads, "a number of threads");
  } else if (accept_qualifier(".reqnctapercluster")) {
    up_to_three(function.required_cluster, "a number of CTAs");
  } else if (accept_qualifier(".explicitcluster")) {
    function.explicit_cluster = true;
  } else if (accept_qualifier(".maxnreg")) {
    function.max_registers = small_integer("a number of registers");
  } else if (accept_qualifier(".minnctapersm") || accept_qualifier(".maxnctapersm") ||
             accept_qualifier(".maxclusterrank") || accept_qualifier(".abi_preserve") ||
             accept_qualifier(".abi_preserve_control")) {
    small_integer("a number");  // wishes to ptxas; no thread can see them
  } else if (accept_qualifier(".noreturn")) {
    function.noreturn = true;
  } else if (accept_qualifier(".attribute")) {
    attribute();
  } else if (accept_qualifier(".pragma")) {
    while (token_.kind == TokenKind::kString || token_.is(",")) advance();
    expect(";");
  } else {
    return false;
  }
  return true;
}

void Parser::function(bool is_entry, bool is_extern) {
  Function function;
  function.is_entry = is_entry;
  function.is_extern = is_extern;
  function.line = token_.line;
  while (accept_qualifier(".attribute")) attribute();
  if (!is_entry && token_.is("(")) function.returns = parameters();
  function.name = identifier("a function's name");
  if (token_.is("(")) function.params = parameters();
  while (performance_directive(function)) {
  }
  if (token_.is("{")) {
    function.has_body = true;
    call_sites_.clear();
    body(function);
  } else {
    expect(";");
  }
  ast_.functions.push_back(std::move(function));
}

void Parser::body(Function& function) {
  expect("{");
  block_depth_ = 1;
  while (block_depth_ > 0) statement(function);
  function.body.pop_back();  // the function's own closing brace
}

void Parser::statement(Function& function) {
  const uint32_t line = token_.line;
  if (accept(";")) return;
  if (accept("{")) {
    if (++block_depth_ > kMaxBlockDepth) syntax_error(line, "blocks nested too deeply");
    function.body.push_back({StatementKind::kOpen, line, 0, {}});
  } else if (accept("}")) {
    --block_depth_;
    function.body.push_back({StatementKind::kClose, line, 0, {}});
  } else if (token_.kind == TokenKind::kQualifier) {
    if (!body_directive(function)) unexpected("a directive or an instruction");
  } else if (token_.kind == TokenKind::kIdentifier && ahead_.is(":")) {
    const std::string_view label = token_.text;
    advance();
    advance();
    if (token_.is_qualifier(".branchtargets") || token_.is_qualifier(".calltargets") ||
        token_.is_qualifier(".callprototype")) {
      labelled_directive(function, label, line);
    } else {
      function.body.push_back({StatementKind::kLabel, line, 0, label});
    }
  } else {
    instruction(function);
  }
}

void Parser::labelled_directive(Function& function, std::string_view label, uint32_t line) {
  if (accept_qualifier(".callprototype")) {
    skip_prototype();
    function.body.push_back({StatementKind::kPrototype, line, 0, label});
    return;
  }
  advance();
  Range list{uint32_t(ast_.names.size()), 0};
  do {
    ast_.names.push_back(identifier("a label"));
    ++list.count;
  } while (accept(","));
  expect(";");
  function.body.push_back(
      {StatementKind::kTargets, line, uint32_t(ast_.target_lists.size()), label});
  ast_.target_lists.push_back(list);
}

// (.param .b32 _) _ (.param .b64 _) .noreturn;
void Parser::skip_prototype() {
  if (token_.is("(")) parameters();
  identifier("'_'");
  if (token_.is("(")) parameters();
  Function attributes;
  while (!token_.is(";") && performance_directive(attributes)) {
  }
  expect(";");
}

bool Parser::body_directive(Function& function) {
  if (accept_qualifier(".loc")) {
    location(function);
    return true;
  }
  if (accept_qualifier(".pragma")) {
    do {
      if (token_.kind != TokenKind::kString) unexpected("a pragma in quotes");
      advance();
    } while (accept(","));
    expect(";");
    return true;
  }
  bool is_extern = false;
  while (token_.is_qualifier(".extern") || token_.is_qualifier(".weak") ||
         token_.is_qualifier(".visible")) {
    is_extern |= token_.is_qualifier(".extern");
    advance();
  }
  for (auto [name, storage] : {std::pair{".reg", Storage::kReg},
                               {".param", Storage::kParam},
                               {".local", Storage::kLocal},
                               {".shared", Storage::kShared},
                               {".global", Storage::kGlobal},
                               {".const", Storage::kConst}}) {
    if (!accept_qualifier(name)) continue;
    const uint32_t line = token_.line;
    std::vector<Variable> declared;
    variables(declared, storage, is_extern);
    for (Variable& variable : declared) {
      function.body.push_back(
          {StatementKind::kVariable, line, uint32_t(ast_.variables.size()), variable.name});
      ast_.variables.push_back(variable);
    }
    return true;
  }
  return false;
}

// .loc 1 4 30
// .loc 2 90 3, function_name $L__info_string1 [+ 8], inlined_at 1 17 15
void Parser::location(Function& function) {
  const auto key = [](uint64_t file, uint64_t line, uint64_t column) {
    return ((file * 0x9E3779B97F4A7C15u) ^ line) * 0x9E3779B97F4A7C15u ^ column;
  };
  Location location;
  const uint32_t statement_line = token_.line;
  location.file = file_index(unsigned_integer("a file number"));
  location.line = small_integer("a line number");
  uint64_t own = key(location.file, location.line, small_integer("a column"));
  while (accept(",")) {
    const std::string_view attribute = identifier("function_name or inlined_at");
    if (attribute == "function_name") {
      identifier("a label of .debug_str");
      if (accept("+")) unsigned_integer("an offset");
    } else if (attribute == "inlined_at") {
      const uint32_t file = file_index(unsigned_integer("a file number"));
      const uint32_t line = small_integer("a line number");
      const auto outer = call_sites_.find(key(file, line, small_integer("a column")));
      // The call may itself lie in an inlined function; its own .loc came before and tells.
      const bool nested = outer != call_sites_.end() && outer->second.caller_line;
      location.caller_file = nested ? outer->second.caller_file : file;
      location.caller_line = nested ? outer->second.caller_line : line;
    } else {
      syntax_error(statement_line, "unknown attribute of .loc: '" + std::string(attribute) + "'");
    }
  }
  call_sites_[own] = location;
  function.body.push_back(
      {StatementKind::kLocation, statement_line, uint32_t(ast_.locations.size()), {}});
  ast_.locations.push_back(location);
}

}  // namespace fused_peft::sim::ptx
