// Where a warp is, in words.
#include <bit>
#include <string>

#include "simulator/core/cta.h"

namespace fused_peft::sim {
namespace {

std::string source_of(const Program& program, const Instr& instr) {
  if (instr.index >= program.lines.size()) return "";
  const SourceLine& line = program.lines[instr.index];
  if (line.line == 0 || line.file >= program.files.size()) {
    return " (PTX line " + std::to_string(line.ptx_line) + ")";
  }
  return " (" + program.files[line.file] + ":" + std::to_string(line.line) + ")";
}

}  // namespace

std::string describe_lanes(LaneMask lanes) {
  std::string text;
  while (lanes != 0) {
    const int first = std::countr_zero(lanes);
    const int count = std::countr_one(lanes >> first);
    if (!text.empty()) text += ',';
    text += std::to_string(first);
    if (count > 1) text += '-' + std::to_string(first + count - 1);
    lanes = first + count >= kLanes ? 0 : lanes >> (first + count) << (first + count);
  }
  return text;
}

std::string describe_instruction(const Program& program, const Instr& instr) {
  return (instr.index < program.texts.size() ? program.texts[instr.index] : "?") +
         source_of(program, instr);
}

std::string describe(const Warp& warp, const Instr& instr, LaneMask lanes) {
  const Program& program = *warp.program;
  const Dim3& block = warp.cta->index;
  return "kernel " + program.name + ", block (" + std::to_string(block.x) + ", " +
         std::to_string(block.y) + ", " + std::to_string(block.z) + "), warp " +
         std::to_string(warp.index) + ", lanes " + describe_lanes(lanes) + ": " +
         describe_instruction(program, instr);
}

}  // namespace fused_peft::sim
