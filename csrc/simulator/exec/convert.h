// cvt in parts: convert.cpp takes the instruction apart, convert_fast.cpp has vectorised handlers
// for what compilers emit most, convert_packed.cpp the conversions of two values into one register.
#pragma once

#include "simulator/core/decoder.h"
#include "simulator/exec/numeric.h"

namespace fused_peft::sim {

// The four ways to round to an integer, in the order of Rounding.
struct Conversion {
  Type dest = Type::kNone, source = Type::kNone;
  Rounding rounding = Rounding::kNearestEven;
  bool to_integer = false;  // .rni .rzi .rmi .rpi: `rounding` is to an integral value
  bool ftz = false, sat = false, relu = false, satfinite = false;

  uint32_t pack() const {
    return uint32_t(dest) | uint32_t(source) << 6 | uint32_t(rounding) << 12 |
           uint32_t{to_integer} << 16 | uint32_t{ftz} << 17 | uint32_t{sat} << 18 |
           uint32_t{relu} << 19 | uint32_t{satfinite} << 20;
  }
  static Conversion unpack(uint32_t bits) {
    const auto flag = [bits](unsigned i) { return (bits >> i & 1) != 0; };
    return {Type(bits & 63),
            Type(bits >> 6 & 63),
            Rounding(bits >> 12 & 15),
            flag(16),
            flag(17),
            flag(18),
            flag(19),
            flag(20)};
  }
};

// nullptr where there is no faster way than the general one. The registers are as wide as the
// types.
Handler fast_conversion(const Conversion& what);

// Decodes the rest of the instruction (operands, handler); false if the types are no packed ones.
bool decode_packed_conversion(Decoding& d, const Conversion& what);
// cvt.pack.sat
void decode_pack_conversion(Decoding& d);

// The integer next to a float in the rounding mode's direction, as a float.
inline double round_to_integer(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::kZero: return std::trunc(value);
    case Rounding::kDown: return std::floor(value);
    case Rounding::kUp: return std::ceil(value);
    default: return std::nearbyint(value);
  }
}

// A value into a narrow format with the qualifiers of a conversion. Format::kNan for NaN.
template <class Format>
typename Format::Bits convert_to(double value, Rounding rounding, bool relu, bool satfinite) {
  if (relu && value <= 0.0) return 0;
  return encode<Format>(value, rounding, satfinite);
}

}  // namespace fused_peft::sim
