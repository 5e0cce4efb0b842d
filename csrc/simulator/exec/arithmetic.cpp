#include "simulator/exec/arithmetic.h"

#include <cstdlib>
#include <iterator>

#include "simulator/exec/families.h"

namespace fused_peft::sim {

void take_operands(Decoding& d, Type type, int sources) {
  d.dest(type);
  for (int i = 0; i < sources; ++i) d.source(type);
}

void refuse(const Decoding& d, const std::string& what) {
  d.unsupported(what);
  std::abort();
}

void refuse_malformed(const Decoding& d, const std::string& what) {
  d.malformed(what);
  std::abort();
}

namespace {

bool has_any(const Decoding& d, std::initializer_list<std::string_view> qualifiers) {
  for (std::string_view qualifier : qualifiers) {
    if (d.has(qualifier)) return true;
  }
  return false;
}

template <Arithmetic kOp>
void decode(Decoding& d) {
  if (has_any(d, {".f32", ".f64", ".f32x2"})) return decode_float_arithmetic(d, kOp);
  if (has_any(d, {".f16", ".f16x2", ".bf16", ".bf16x2"})) return decode_half_arithmetic(d, kOp);
  if (d.take(".cc")) return decode_carry_arithmetic(d, kOp, false);
  decode_integer_arithmetic(d, kOp);
}

constexpr Opcode kOpcodes[] = {
    {"add", decode<Arithmetic::kAdd>}, {"sub", decode<Arithmetic::kSub>},
    {"mul", decode<Arithmetic::kMul>}, {"mad", decode<Arithmetic::kMad>},
    {"fma", decode<Arithmetic::kFma>}, {"div", decode<Arithmetic::kDiv>},
    {"rem", decode<Arithmetic::kRem>}, {"abs", decode<Arithmetic::kAbs>},
    {"neg", decode<Arithmetic::kNeg>}, {"min", decode<Arithmetic::kMin>},
    {"max", decode<Arithmetic::kMax>},
};

}  // namespace

const OpcodeFamily kArithmeticFamily = {"arithmetic", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
