// add, sub, mul, ... exist for integers, floats and halves: arithmetic.cpp looks at the type and
// hands the instruction to the file of its domain.
#pragma once

#include "simulator/core/decoder.h"

namespace fused_peft::sim {

enum class Arithmetic : uint8_t {
  kAdd,
  kSub,
  kMul,
  kMad,
  kFma,
  kDiv,
  kRem,
  kAbs,
  kNeg,
  kMin,
  kMax
};

void decode_integer_arithmetic(Decoding& d, Arithmetic op);  // integer.cpp
void decode_float_arithmetic(Decoding& d, Arithmetic op);    // float.cpp
void decode_half_arithmetic(Decoding& d, Arithmetic op);     // half.cpp

// add.cc, sub.cc, mad.cc: carry.cpp.
void decode_carry_arithmetic(Decoding& d, Arithmetic op, bool carry_in);

// d.dest and then `sources` sources, all of one type.
void take_operands(Decoding& d, Type type, int sources);

// Decoding::unsupported and ::malformed, which compilers do not see to never return.
[[noreturn]] void refuse(const Decoding& d, const std::string& what);
[[noreturn]] void refuse_malformed(const Decoding& d, const std::string& what);

// fn(T()) with the unsigned type as wide as `type`: 2, 4 or 8 bytes.
template <class Fn>
auto with_width(const Decoding& d, Type type, Fn fn) -> decltype(fn(uint32_t{})) {
  switch (bytes_of(type)) {
    case 2: return fn(uint16_t{});
    case 4: return fn(uint32_t{});
    case 8: return fn(uint64_t{});
    default: refuse(d, std::string("type ") + name_of(type));
  }
}

}  // namespace fused_peft::sim
