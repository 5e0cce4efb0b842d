#include "simulator/program/decoding.h"

#include <algorithm>

namespace fused_peft::sim {
// Blanks and comments as one blank: the text of an instruction on one line.
std::string clean_text(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) {
    if (text.substr(i, 2) == "//") {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.substr(i, 2) == "/*") {
      i = std::min(text.find("*/", i + 2), text.size() - 2) + 2;
    } else if (uint8_t(text[i]) > ' ') {
      out += text[i++];
      continue;
    } else {
      ++i;
    }
    if (!out.empty() && out.back() != ' ') out += ' ';
  }
  while (!out.empty() && out.back() == ' ') out.pop_back();
  return out;
}

InstructionDecoding::InstructionDecoding(ProgramBuilder& builder, Activation& activation,
                                         const InstructionText& text)
    : builder_(builder), activation_(activation), text_(text) {
  levels_.push_back({text.operands.data(), text.operands.data() + text.operands.size()});
  if (text.qualifiers.size() > 64) malformed("more than 64 qualifiers");
}

std::string InstructionDecoding::where() const {
  return "PTX line " + std::to_string(text_.line) + ": '" + clean_text(text_.text) + "'";
}
void InstructionDecoding::unsupported(const std::string& what) const {
  throw Unsupported(where() + ": " + what);
}
void InstructionDecoding::malformed(const std::string& what) const {
  throw SyntaxError(where() + ": " + what);
}

// ---- qualifiers

bool InstructionDecoding::has(std::string_view qualifier) const {
  for (std::size_t i = 0; i < text_.qualifiers.size(); ++i) {
    if (!(taken_ >> i & 1) && text_.qualifiers[i] == qualifier) return true;
  }
  return false;
}

bool InstructionDecoding::take(std::string_view qualifier) {
  return !take_one({qualifier}).empty();
}

std::string_view InstructionDecoding::take_one(std::initializer_list<std::string_view> qualifiers) {
  for (std::size_t i = 0; i < text_.qualifiers.size(); ++i) {
    if (taken_ >> i & 1) continue;
    for (std::string_view wanted : qualifiers) {
      if (text_.qualifiers[i] != wanted) continue;
      taken_ |= uint64_t{1} << i;
      return text_.qualifiers[i];
    }
  }
  return {};
}

Type InstructionDecoding::take_type() {
  for (std::size_t i = 0; i < text_.qualifiers.size(); ++i) {
    if (taken_ >> i & 1) continue;
    const Type type = type_from_name(text_.qualifiers[i].data(), int(text_.qualifiers[i].size()));
    if (type == Type::kNone) continue;
    taken_ |= uint64_t{1} << i;
    return type;
  }
  return Type::kNone;
}

Type InstructionDecoding::need_type() {
  const Type type = take_type();
  if (type == Type::kNone) malformed("a type is missing");
  return type;
}

// ---- result

void InstructionDecoding::handler(Handler run, InstrClass kind, uint8_t flags) {
  instr_.run = run;
  instr_.kind = kind;
  instr_.flags = flags;
}

void InstructionDecoding::keep(std::shared_ptr<const void> extra) {
  instr_.extra = extra.get();
  builder_.program_->extras.push_back(std::move(extra));
}

Instr InstructionDecoding::finish() {
  for (std::size_t i = 0; i < text_.qualifiers.size(); ++i) {
    if (!(taken_ >> i & 1)) unsupported("qualifier " + std::string(text_.qualifiers[i]));
  }
  if (peek() || levels_.size() > 1) malformed("too many operands");
  if (!instr_.run) unsupported("this form of the instruction");
  instr_.operands = builder_.store(operands_);
  return instr_;
}

}  // namespace fused_peft::sim
