// The operands of an instruction: registers, constants, symbols, vectors and addresses.
#include "simulator/exec/special.h"
#include "simulator/program/decoding.h"
#include "simulator/program/immediate.h"

namespace fused_peft::sim {
namespace {

constexpr std::string_view kComponents = "xyzw";

std::string special_name(const ptx::Node& node) {
  std::string name(node.name);
  if (node.component) name += {'.', node.component};
  return name;
}

// The bytes of "+8" or "[2]" behind a symbol.
uint64_t offset_in(const Symbol& symbol, const ptx::Node& node) {
  const uint64_t unit = node.indexed ? uint64_t(bytes_of(symbol.type)) * symbol.vector : 1;
  return uint64_t(node.value) * unit;
}

// "%tid" stands for %tid.x, .y, .z and .w.
bool is_special_vector(const ptx::Node& node) {
  return !node.component && find_special(std::string(node.name) + ".x") != nullptr;
}

}  // namespace

const ptx::Node* InstructionDecoding::peek() const {
  const Level& level = levels_.back();
  return level.next == level.end ? nullptr : level.next;
}

const ptx::Node& InstructionDecoding::need_next(const char* what) {
  const ptx::Node* node = peek();
  if (!node) malformed(std::string("an operand is missing: ") + what);
  return *node;
}

const Symbol* InstructionDecoding::lookup(const ptx::Node& node) const {
  return builder_.find(activation_, node.name);
}

OperandText InstructionDecoding::kind_of(const ptx::Node& node) const {
  switch (node.kind) {
    case ptx::NodeKind::kInteger: return OperandText::kImmediate;
    case ptx::NodeKind::kFloat: return OperandText::kFloatImmediate;
    case ptx::NodeKind::kVector: return OperandText::kVector;
    case ptx::NodeKind::kAddress: return OperandText::kAddress;
    case ptx::NodeKind::kList: malformed("a list in parentheses where an operand is expected");
    case ptx::NodeKind::kName: break;
  }
  if (node.name == "_") return OperandText::kSink;
  if (const Symbol* symbol = lookup(node)) {
    if (symbol->kind == SymbolKind::kRegister) return OperandText::kRegister;
    if (symbol->kind != SymbolKind::kVectorRegister) return OperandText::kSymbol;
    return node.component ? OperandText::kRegister : OperandText::kVector;
  }
  if (node.name[0] == '%') {
    if (find_special(special_name(node))) return OperandText::kSpecial;
    if (is_special_vector(node)) return OperandText::kVector;
    malformed("unknown register '" + special_name(node) + "'");
  }
  return OperandText::kLabel;
}

OperandText InstructionDecoding::next_operand() const {
  const ptx::Node* node = peek();
  return node ? kind_of(*node) : OperandText::kNone;
}

std::span<const ptx::Node> InstructionDecoding::elements_of(const ptx::Node& node) const {
  if (node.kind == ptx::NodeKind::kVector) return builder_.children(node);
  const Symbol* symbol = lookup(node);
  std::vector<ptx::Node>& elements =
      made_.emplace_back(symbol ? symbol->vector : kComponents.size(), node);
  for (std::size_t i = 0; i < elements.size(); ++i) elements[i].component = kComponents[i];
  return elements;
}

int InstructionDecoding::vector_length() const {
  const ptx::Node* node = peek();
  if (!node || kind_of(*node) != OperandText::kVector) return 1;
  if (node->kind == ptx::NodeKind::kVector) return int(node->children.count);
  const Symbol* symbol = lookup(*node);
  return symbol ? symbol->vector : int(kComponents.size());
}

int InstructionDecoding::operands_left() const {
  return int(levels_.back().end - levels_.back().next);
}

const Operand& InstructionDecoding::register_of(const ptx::Node& node) const {
  const Symbol* symbol = lookup(node);
  if (node.value || node.indexed) malformed("an offset behind a register");
  if (symbol->kind == SymbolKind::kRegister) {
    if (node.component) malformed("'" + std::string(node.name) + "' is no vector");
    return symbol->slot;
  }
  const std::size_t component = kComponents.find(node.component);
  if (component >= symbol->vector)
    malformed("'" + std::string(node.name) + "' has no such component");
  return symbol->components[component];
}

int InstructionDecoding::next_width() const {
  const ptx::Node* node = peek();
  return node && kind_of(*node) == OperandText::kRegister ? register_of(*node).bytes : -1;
}

void InstructionDecoding::check_width(const Operand& operand, Type type, bool allow_wider,
                                      const ptx::Node& node) const {
  const uint32_t wanted = register_bytes(type);
  if (operand.bytes == wanted || (allow_wider && wanted && operand.bytes > wanted)) return;
  malformed("'" + std::string(node.name) + "' is " +
            (operand.bytes ? std::to_string(8 * operand.bytes) + " bits wide" : "a predicate") +
            ", the type is " + name_of(type));
}

void InstructionDecoding::dest(Type type, bool allow_wider) {
  const ptx::Node& node = need_next("a destination");
  switch (kind_of(node)) {
    case OperandText::kSink: add_dest(Frame::sink(type)); break;
    case OperandText::kRegister: {
      const Operand& slot = register_of(node);
      check_width(slot, type, allow_wider, node);
      if (node.negated) malformed("a destination cannot be negated");
      add_dest(slot);
      break;
    }
    default: malformed("the destination is no register");
  }
  skip();
}

Operand InstructionDecoding::symbol_operand(const ptx::Node& node, Type type) {
  const Symbol& symbol = *lookup(node);
  const uint32_t bytes = register_bytes(type);
  if (symbol.kind == SymbolKind::kUndefined)
    unsupported("'" + std::string(node.name) + "' is not defined in this module");
  if (bytes != 4 && bytes != 8) malformed("an address is 32 or 64 bits wide");
  if (symbol.kind == SymbolKind::kDynamicShared) {
    return builder_.constants_.patched(offset_in(symbol, node), bytes);
  }
  if (bytes == 4 && (symbol.space == Space::kGlobal || symbol.space == Space::kConst)) {
    malformed("the address of '" + std::string(node.name) + "' has 64 bits");
  }
  return builder_.constants_.number(symbol.address + offset_in(symbol, node), 0, bytes);
}

Operand InstructionDecoding::source_operand(const ptx::Node& node, Type type, bool allow_wider) {
  const OperandText kind = kind_of(node);
  if (node.negated && kind != OperandText::kRegister && kind != OperandText::kSpecial) {
    malformed("only a predicate can be negated");
  }
  switch (kind) {
    case OperandText::kImmediate:
    case OperandText::kFloatImmediate: {
      uint64_t bits = 0;
      if (!immediate_bits(kind == OperandText::kFloatImmediate, node.is_single,
                          uint64_t(node.value), type, &bits)) {
        malformed(std::string("a constant that is none of type ") + name_of(type));
      }
      if (type == Type::kPred) return builder_.constants_.predicate(bits);
      // One-byte types are read as 16-bit elements.
      const bool negative = is_signed(type) && node.value < 0;
      if (bytes_of(type) == 1 && negative) bits |= 0xff00;
      return builder_.constants_.number(bits, negative ? ~uint64_t{0} : 0, register_bytes(type));
    }
    case OperandText::kRegister:
    case OperandText::kSpecial: {
      Operand operand = kind == OperandText::kRegister
                            ? register_of(node)
                            : builder_.special_register(activation_, special_name(node), text_);
      check_width(operand, type, allow_wider, node);
      if (node.negated && type != Type::kPred) malformed("only a predicate can be negated");
      operand.negated = node.negated;
      return operand;
    }
    case OperandText::kSymbol: return symbol_operand(node, type);
    default: malformed("not an operand to read: '" + std::string(node.name) + "'");
  }
}

void InstructionDecoding::source(Type type, bool allow_wider) {
  add_source(source_operand(need_next("a source"), type, allow_wider));
  skip();
}

void InstructionDecoding::carry_dest() { add_dest(activation_.carry); }
void InstructionDecoding::carry_source() { add_source(activation_.carry); }

void InstructionDecoding::add_dest(const Operand& operand) {
  operands_.insert(operands_.begin() + instr_.num_dests, operand);
  ++instr_.num_dests;
  instr_.operands = operands_.data();
}

void InstructionDecoding::add_source(const Operand& operand) {
  operands_.push_back(operand);
  ++instr_.num_sources;
  instr_.operands = operands_.data();
}

void InstructionDecoding::open_vector() {
  const ptx::Node& node = need_next("a vector");
  if (kind_of(node) != OperandText::kVector) malformed("a vector {...} is expected");
  const std::span<const ptx::Node> elements = elements_of(node);
  skip();
  levels_.push_back({elements.data(), elements.data() + elements.size()});
}

void InstructionDecoding::close_vector() {
  if (peek()) malformed("a vector has too many elements");
  levels_.pop_back();
}

bool InstructionDecoding::has_second_predicate() const {
  const ptx::Node* node = peek();
  return node && node->paired;
}

Operand InstructionDecoding::address_base(const ptx::Node& node) {
  if (node.kind == ptx::NodeKind::kInteger)
    return builder_.constants_.number(uint64_t(node.value), 0, 8);
  switch (kind_of(node)) {
    case OperandText::kRegister: {
      const Operand& slot = register_of(node);
      if (slot.bytes != 4 && slot.bytes != 8) malformed("an address is 32 or 64 bits wide");
      return slot;
    }
    case OperandText::kSymbol: return symbol_operand(node, Type::kU64);
    case OperandText::kLabel: malformed("unknown name '" + std::string(node.name) + "'");
    default: malformed("not an address");
  }
}

void InstructionDecoding::address() {
  const ptx::Node& node = need_next("an address");
  if (node.indexed && kind_of(node) == OperandText::kSymbol) {
    add_source(symbol_operand(node, Type::kU64));
    return skip();
  }
  if (node.kind != ptx::NodeKind::kAddress) malformed("an address [...] is expected");
  const std::span<const ptx::Node> parts = builder_.children(node);
  if (parts.size() != 1) malformed("an address of one part is expected");
  add_source(address_base(parts[0]));
  instr_.imm = node.value;
  skip();
}

void InstructionDecoding::open_address() {
  const ptx::Node& node = need_next("an address");
  if (node.kind != ptx::NodeKind::kAddress) malformed("an address [...] is expected");
  std::span<const ptx::Node> parts = builder_.children(node);
  if (node.value) {
    // An offset of the first part is its own again: "[map+64, {x, y}]".
    std::vector<ptx::Node>& copy = made_.emplace_back(parts.begin(), parts.end());
    copy[0].value = node.value;
    parts = copy;
  }
  skip();
  levels_.push_back({parts.data(), parts.data() + parts.size()});
}

void InstructionDecoding::close_address() {
  if (peek()) malformed("an address has too many parts");
  levels_.pop_back();
}

int64_t InstructionDecoding::immediate() {
  const ptx::Node& node = need_next("a constant");
  if (node.kind != ptx::NodeKind::kInteger) malformed("an integer constant is expected");
  skip();
  return node.value;
}

bool InstructionDecoding::next_is_immediate() const {
  const ptx::Node* node = peek();
  return node && node->kind == ptx::NodeKind::kInteger;
}

void InstructionDecoding::label(const ptx::Node& node, uint32_t statement) {
  Activation::Fixup fixup{kNoRegister, statement, nullptr};
  if (statement == LabelTable::kMissing)
    malformed("no label '" + std::string(node.name) + "' in this scope");
  if (node.name != kMadeLabel &&
      activation_.function.body[statement].kind == ptx::StatementKind::kTargets) {
    fixup.targets = std::make_shared<std::vector<uint32_t>>();
    keep(fixup.targets);
  }
  // emit() fills in the instruction's index.
  activation_.fixups.push_back(std::move(fixup));
}

std::string InstructionDecoding::name() {
  const ptx::Node& node = need_next("a name");
  if (node.kind != ptx::NodeKind::kName) malformed("a name is expected");
  if (kind_of(node) == OperandText::kLabel) {
    label(node, node.name == kMadeLabel ? uint32_t(node.value)
                                        : activation_.labels.find(activation_.block(), node.name));
  }
  skip();
  return std::string(node.name);
}

Space InstructionDecoding::symbol_space() const {
  const ptx::Node* node = peek();
  if (!node || (node->kind != ptx::NodeKind::kAddress && !node->indexed)) return Space::kGeneric;
  const ptx::Node& base = node->indexed ? *node : builder_.children(*node)[0];
  if (base.kind != ptx::NodeKind::kName || kind_of(base) != OperandText::kSymbol)
    return Space::kGeneric;
  return lookup(base)->space;
}

}  // namespace fused_peft::sim
