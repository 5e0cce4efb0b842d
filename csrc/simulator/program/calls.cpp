// Calls: device functions are inlined, extern ones (vprintf, malloc ...) become one instruction.
//
// The parameters of a device function lie in the calling thread's private memory, and the caller's
// own .param variables are there already: where both sides are .param, the callee's name stands for
// the caller's variable, and nothing is copied.
#include <tuple>
#include <utility>

#include "simulator/core/errors.h"
#include "simulator/program/builder.h"
#include "simulator/program/decoding.h"

namespace fused_peft::sim {
namespace {

constexpr int kMaxDepth = 128;                       // of calls
constexpr std::string_view kFormal = "(parameter)";  // no name of a text

// ".b32" for anything of 32 bits.
std::string_view untyped(Type type) {
  switch (bytes_of(type)) {
    case 0: return ".pred";
    case 1: return ".b8";
    case 2: return ".b16";
    case 4: return ".b32";
    case 8: return ".b64";
    default: return ".b128";
  }
}

std::string quoted(std::string_view name) { return "'" + std::string(name) + "'"; }

}  // namespace

struct ProgramBuilder::Call {
  Activation& caller;
  const InstructionText& text;
  const ptx::Function& callee;
  std::span<const ptx::Node> returns, arguments;

  [[noreturn]] void malformed(const std::string& what) const {
    throw SyntaxError("PTX line " + std::to_string(text.line) + ": " +
                      quoted(clean_text(text.text)) + ": " + what);
  }
  [[noreturn]] void unsupported(const std::string& what) const {
    throw Unsupported("PTX line " + std::to_string(text.line) + ": " +
                      quoted(clean_text(text.text)) + ": " + what);
  }
};

std::span<const ptx::Node> ProgramBuilder::children(const ptx::Node& node) const {
  if (node.children.first < ast_.nodes.size() || node.children.count == 0) {
    return {ast_.nodes.data() + node.children.first, node.children.count};
  }
  return {&made_nodes_[node.children.first - ast_.nodes.size()], 1};
}

ptx::Node ProgramBuilder::address_of(const ptx::Node& name) {
  ptx::Node node;
  node.kind = ptx::NodeKind::kAddress;
  node.children = {uint32_t(ast_.nodes.size() + made_nodes_.size()), 1};
  made_nodes_.push_back(name);
  return node;
}

// call (returns), name, (arguments), prototype;  all but the name may be absent.
void ProgramBuilder::call(Activation& activation, const ptx::Instruction& instruction) {
  const InstructionText text{
      instruction.opcode,
      {ast_.names.data() + instruction.qualifiers.first, instruction.qualifiers.count},
      {},
      instruction.guard,
      instruction.guard_negated,
      instruction.line,
      instruction.text};
  std::span<const ptx::Node> operands(ast_.nodes.data() + instruction.operands.first,
                                      instruction.operands.count);
  const auto list = [&]() -> std::span<const ptx::Node> {
    if (operands.empty() || operands[0].kind != ptx::NodeKind::kList) return {};
    const ptx::Node& node = operands[0];
    operands = operands.subspan(1);
    return children(node);
  };
  const InstructionDecoding messages(*this, activation, text);
  for (std::string_view qualifier : text.qualifiers) {
    if (qualifier != ".uni") messages.unsupported("qualifier " + std::string(qualifier));
  }
  const std::span<const ptx::Node> returns = list();
  if (operands.empty() || operands[0].kind != ptx::NodeKind::kName)
    messages.malformed("the function's name is missing");
  const std::string_view name = operands[0].name;
  operands = operands.subspan(1);
  const std::span<const ptx::Node> arguments = list();
  const Symbol* symbol = find(activation, name);
  if (symbol && symbol->kind == SymbolKind::kRegister)
    messages.unsupported("call through a pointer");
  if (!symbol || symbol->kind != SymbolKind::kFunction)
    messages.malformed("no function " + quoted(name));
  if (!operands.empty()) messages.malformed("too many operands");

  const Call call{activation, text, *symbol->function, returns, arguments};
  if (call.callee.is_entry) call.unsupported("call of a kernel");
  if (returns.size() != call.callee.returns.size() ||
      arguments.size() != call.callee.params.size()) {
    call.malformed(quoted(name) + " returns " + std::to_string(call.callee.returns.size()) +
                   " and takes " + std::to_string(call.callee.params.size()) + " parameters");
  }
  call.callee.has_body ? inline_call(call) : extern_call(call);
}

void ProgramBuilder::inline_call(const Call& call) {
  int depth = 0;
  for (const Activation* caller = &call.caller; caller; caller = caller->caller) {
    if (&caller->function == &call.callee) call.unsupported("recursion");
    if (++depth > kMaxDepth)
      call.unsupported("calls nested more than " + std::to_string(kMaxDepth) + " deep");
  }
  const auto tops = std::pair(local_top_, private_top_);
  const SourceLine line = line_;
  const bool guarded = !call.text.guard.empty();
  const ptx::Node behind = call.caller.make_label();
  if (guarded) jump(call.caller, call.text, behind, true);

  Activation activation(call.callee, labels_of(call.callee));
  activation.caller = &call.caller;
  activation.scopes.emplace_back(nullptr);
  activation.end = activation.make_label();
  activation.carry = frame_.allocate(Type::kPred);
  const auto declare_formals = [&](const std::vector<ptx::Variable>& formals,
                                   std::span<const ptx::Node> actuals, bool into_callee) {
    for (std::size_t i = 0; i < formals.size(); ++i) {
      const Symbol symbol = pass(call, formals[i], actuals[i], into_callee);
      if (formals[i].name != "_" && !activation.scope().declare(formals[i].name, symbol)) {
        call.malformed("parameter " + quoted(formals[i].name) + " is declared twice");
      }
    }
  };
  declare_formals(call.callee.returns, call.returns, false);
  declare_formals(call.callee.params, call.arguments, true);
  line_ = {};
  body(activation);
  activation.positions[uint32_t(activation.end.value)] = uint32_t(program_->code.size());
  patch(activation);
  line_ = line;
  for (std::size_t i = 0; i < call.returns.size(); ++i) {
    const ptx::Variable& formal = call.callee.returns[i];
    if (parameter_named(call.caller, call.returns[i]) && formal.storage == ptx::Storage::kParam)
      continue;
    move(call, formal, *activation.scope().find(formal.name, frame_), call.returns[i], false);
  }
  call.caller.positions[uint32_t(behind.value)] = uint32_t(program_->code.size());
  std::tie(local_top_, private_top_) = tops;
}

// The caller's .param variable that is the argument; nullptr where it is a register or a constant.
const Symbol* ProgramBuilder::parameter_named(Activation& activation, const ptx::Node& node) {
  if (node.kind != ptx::NodeKind::kName) return nullptr;
  const Symbol* symbol = find(activation, node.name);
  return symbol && symbol->kind == SymbolKind::kAddress && symbol->space == Space::kParam ? symbol
                                                                                          : nullptr;
}

// What the callee's parameter stands for. Arguments get their values here, return values in move().
Symbol ProgramBuilder::pass(const Call& call, const ptx::Variable& formal, const ptx::Node& actual,
                            bool into_callee) {
  const Symbol* parameter = parameter_named(call.caller, actual);
  if (parameter && formal.storage == ptx::Storage::kParam) {
    if (parameter->bytes < formal.bytes()) {
      call.malformed(quoted(actual.name) + " has " + std::to_string(parameter->bytes) +
                     " bytes, the parameter " + std::to_string(formal.bytes()));
    }
    return *parameter;
  }
  if (formal.is_array || formal.vector > 1)
    call.malformed("an array is passed in a .param variable");
  const Symbol symbol = symbol_of_variable(formal);
  if (into_callee) move(call, formal, symbol, actual, true);
  return symbol;
}

// One instruction in the caller between the argument and the parameter; either may be a register or
// in memory.
void ProgramBuilder::move(const Call& call, const ptx::Variable& formal, const Symbol& symbol,
                          const ptx::Node& actual, bool into_callee) {
  Activation& caller = call.caller;
  caller.scopes.emplace_back(&caller.scopes.back());
  caller.scope().declare(kFormal, symbol);
  ptx::Node formal_node;
  formal_node.name = kFormal;
  const bool formal_in_memory = formal.storage == ptx::Storage::kParam;
  const bool actual_in_memory = parameter_named(caller, actual) != nullptr;
  ptx::Node operands[2] = {formal_node, actual};
  if (formal_in_memory) operands[0] = address_of(formal_node);
  if (actual_in_memory) operands[1] = address_of(actual);
  if (!into_callee) std::swap(operands[0], operands[1]);
  std::vector<std::string_view> qualifiers{untyped(formal.type)};
  std::string_view opcode = "mov";
  if (formal_in_memory || actual_in_memory) {
    opcode = operands[0].kind == ptx::NodeKind::kAddress ? "st" : "ld";
    qualifiers.insert(qualifiers.begin(), ".param");
  }
  emit(caller, {opcode, qualifiers, operands, {}, false, call.text.line, call.text.text});
  caller.scopes.pop_back();
}

void ProgramBuilder::jump(Activation& activation, const InstructionText& at, const ptx::Node& label,
                          bool negate_guard) {
  emit(activation,
       {"bra", {}, {&label, 1}, at.guard, at.guard_negated != negate_guard, at.line, at.text});
}

void ProgramBuilder::extern_call(const Call& call) {
  const std::string opcode = "call:" + std::string(call.callee.name);
  if (!find_opcode(opcode))
    call.unsupported("function " + quoted(call.callee.name) + " is not defined in this module");
  std::vector<ptx::Node> operands;
  const auto add = [&](const ptx::Variable& formal, const ptx::Node& actual, bool into_callee) {
    if (formal.storage != ptx::Storage::kParam)
      call.unsupported("extern function with a parameter in a register");
    ptx::Node& offset = operands.emplace_back();
    offset.kind = ptx::NodeKind::kInteger;
    offset.value = int64_t(pass(call, formal, actual, into_callee).address - kCalleeParam);
  };
  const uint64_t top = private_top_;
  for (std::size_t i = 0; i < call.returns.size(); ++i)
    add(call.callee.returns[i], call.returns[i], false);
  for (std::size_t i = 0; i < call.arguments.size(); ++i)
    add(call.callee.params[i], call.arguments[i], true);
  emit(call.caller, {opcode,
                     {},
                     operands,
                     call.text.guard,
                     call.text.guard_negated,
                     call.text.line,
                     call.text.text});
  private_top_ = top;
}

}  // namespace fused_peft::sim
