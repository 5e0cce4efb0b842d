// Single- and double-precision arithmetic: add sub mul fma mad div abs neg min max copysign.
#include <array>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/numeric.h"
#include "simulator/exec/rounding.h"

namespace fused_peft::sim {
namespace {

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
// a * (1 / b) with the reciprocal of a divisor above 2^126 flushed to zero, as the ISA describes
// div.approx.
struct DivApprox {
  float operator()(float a, float b) const { return a * flush(1.0f / b); }
};

inline double canonical(double value) { return value; }
using sim::canonical;
inline double flush(double value) { return value; }
using sim::flush;

// An arithmetic Op with the qualifiers .ftz and .sat.
template <class Op, class T, bool kFtz, bool kSat>
struct Qualified {
  template <class... S>
  T operator()(S... sources) const {
    T value = kFtz ? flush(Op()(flush(sources)...)) : Op()(sources...);
    return kSat ? saturate(value) : canonical(value);
  }
};

template <class Op, class T, bool kFtz, bool kSat, class... S>
Handler directed_or_nearest(bool directed) {
  constexpr Handler kNearest = elementwise<Qualified<Op, T, kFtz, kSat>, T, S...>;
  return directed ? in_rounding_mode<kNearest> : kNearest;
}

template <class Op, class T, class... S>
void decode_rounded(Decoding& d) {
  const Rounding rounding = take_rounding(d);
  const bool ftz = d.take(".ftz"), sat = d.take(".sat");
  const Type type = d.need_type();
  if (type == Type::kF64 && (ftz || sat)) refuse_malformed(d, ".ftz and .sat are for .f32");
  take_operands(d, type, sizeof...(S));
  const bool directed = rounding != Rounding::kNearestEven;
  Handler handler;
  if constexpr (sizeof(T) == 8) {
    handler = directed_or_nearest<Op, T, false, false, S...>(directed);
  } else if (ftz) {
    handler = sat ? directed_or_nearest<Op, T, true, true, S...>(directed)
                  : directed_or_nearest<Op, T, true, false, S...>(directed);
  } else {
    handler = sat ? directed_or_nearest<Op, T, false, true, S...>(directed)
                  : directed_or_nearest<Op, T, false, false, S...>(directed);
  }
  d.handler(handler, InstrClass::kFloat);
  d.instr().variant = uint32_t(rounding);
}

template <class Op>
void decode_binary(Decoding& d) {
  d.has(".f64") ? decode_rounded<Op, double, double, double>(d)
                : decode_rounded<Op, float, float, float>(d);
}

void decode_fma(Decoding& d) {
  d.has(".f64") ? decode_rounded<Fma, double, double, double, double>(d)
                : decode_rounded<Fma, float, float, float, float>(d);
}

// div.full is within 2 ulp over the full range: the exact quotient is. So is div.approx, where |b|
// is at most 2^126.
void decode_div(Decoding& d) {
  const std::string_view kind = d.take_one({".approx", ".full"});
  if (kind == ".approx") return decode_binary<DivApprox>(d);
  decode_binary<Div>(d);
}

// ---- sign manipulation: no arithmetic, NaN payloads stay

template <bool kFtz>
struct AbsF32 {
  float operator()(float a) const {
    const float value = kFtz ? flush(a) : a;
    return float_of(bits_of(value) & 0x7fffffff);
  }
};
template <bool kFtz>
struct NegF32 {
  float operator()(float a) const {
    const float value = kFtz ? flush(a) : a;
    return float_of(bits_of(value) ^ 0x80000000);
  }
};
constexpr uint64_t kSign64 = uint64_t{1} << 63;
struct AbsF64 {
  uint64_t operator()(uint64_t a) const { return a & ~kSign64; }
};
struct NegF64 {
  uint64_t operator()(uint64_t a) const { return a ^ kSign64; }
};
struct CopysignF32 {
  uint32_t operator()(uint32_t sign, uint32_t magnitude) const {
    return (sign & 0x80000000) | (magnitude & 0x7fffffff);
  }
};
struct CopysignF64 {
  uint64_t operator()(uint64_t sign, uint64_t magnitude) const {
    return (sign & kSign64) | (magnitude & ~kSign64);
  }
};

template <template <bool> class F32, class F64>
void decode_sign(Decoding& d) {
  const bool ftz = d.take(".ftz");
  const Type type = d.need_type();
  take_operands(d, type, 1);
  if (type == Type::kF64) {
    if (ftz) refuse_malformed(d, ".ftz is for .f32");
    d.handler(elementwise<F64, uint64_t, uint64_t>, InstrClass::kFloat);
  } else {
    d.handler(ftz ? elementwise<F32<true>, float, float> : elementwise<F32<false>, float, float>,
              InstrClass::kFloat);
  }
}

void decode_copysign(Decoding& d) {
  const Type type = d.need_type();
  take_operands(d, type, 2);
  if (type == Type::kF64) {
    d.handler(elementwise<CopysignF64, uint64_t, uint64_t, uint64_t>, InstrClass::kFloat);
  } else if (type == Type::kF32) {
    d.handler(elementwise<CopysignF32, uint32_t, uint32_t, uint32_t>, InstrClass::kFloat);
  } else {
    refuse_malformed(d, "copysign is of .f32 or .f64");
  }
}

// ---- min, max: -0 < +0; a NaN gives way to a number unless .NaN is set

template <bool kMax, bool kNan, bool kFtz, bool kXorSign>
struct Extremum {
  float operator()(float a, float b) const {
    if (kFtz) a = flush(a), b = flush(b);
    const uint32_t sign = (bits_of(a) ^ bits_of(b)) & 0x80000000;
    if (kXorSign) a = std::abs(a), b = std::abs(b);
    const bool first = kMax ? a > b : a < b;
    float value = first ? a : b;
    // Equal: the same number, or zeros of both signs.
    const uint32_t equal = kMax ? bits_of(a) & bits_of(b) : bits_of(a) | bits_of(b);
    value = a == b ? float_of(equal) : value;
    value = a != a ? b : value;
    value = b != b ? a : value;  // a NaN where both are
    const bool nan = kNan ? (a != a) | (b != b) : (a != a) & (b != b);
    if (kXorSign) value = float_of(bits_of(value) | sign);
    return nan ? float_of(F32Format::kNan) : value;
  }
};

template <bool kMax>
struct ExtremumF64 {
  double operator()(double a, double b) const {
    double value = (kMax ? a > b : a < b) ? a : b;
    const auto x = std::bit_cast<uint64_t>(a), y = std::bit_cast<uint64_t>(b);
    value = a == b ? std::bit_cast<double>(kMax ? x & y : x | y) : value;
    value = a != a ? b : value;
    return b != b ? a : value;
  }
};

template <bool kMax, bool kNan, bool kFtz>
Handler extremum_handler(bool xorsign) {
  return xorsign ? elementwise<Extremum<kMax, kNan, kFtz, true>, float, float, float>
                 : elementwise<Extremum<kMax, kNan, kFtz, false>, float, float, float>;
}

template <bool kMax>
void decode_extremum(Decoding& d) {
  const bool ftz = d.take(".ftz"), nan = d.take(".NaN");
  const bool xorsign = d.take(".xorsign");
  if (xorsign && !d.take(".abs")) refuse_malformed(d, ".xorsign comes with .abs");
  const Type type = d.need_type();
  take_operands(d, type, 2);
  if (type == Type::kF64) {
    if (ftz || nan || xorsign) refuse_malformed(d, "a qualifier that .f64 has not");
    d.handler(elementwise<ExtremumF64<kMax>, double, double, double>, InstrClass::kFloat);
  } else if (nan) {
    d.handler(ftz ? extremum_handler<kMax, true, true>(xorsign)
                  : extremum_handler<kMax, true, false>(xorsign),
              InstrClass::kFloat);
  } else {
    d.handler(ftz ? extremum_handler<kMax, false, true>(xorsign)
                  : extremum_handler<kMax, false, false>(xorsign),
              InstrClass::kFloat);
  }
}

constexpr Opcode kOpcodes[] = {{"copysign", decode_copysign}};

}  // namespace

const OpcodeFamily kFloatFamily = {"float", kOpcodes, std::size(kOpcodes)};

void decode_float_arithmetic(Decoding& d, Arithmetic op) {
  if (d.has(".f32x2")) refuse(d, "packed single precision (sm_100)");
  switch (op) {
    case Arithmetic::kAdd: return decode_binary<Add>(d);
    case Arithmetic::kSub: return decode_binary<Sub>(d);
    case Arithmetic::kMul: return decode_binary<Mul>(d);
    case Arithmetic::kMad:
    case Arithmetic::kFma: return decode_fma(d);
    case Arithmetic::kDiv: return decode_div(d);
    case Arithmetic::kAbs: return decode_sign<AbsF32, AbsF64>(d);
    case Arithmetic::kNeg: return decode_sign<NegF32, NegF64>(d);
    case Arithmetic::kMin: return decode_extremum<false>(d);
    case Arithmetic::kMax: return decode_extremum<true>(d);
    case Arithmetic::kRem: refuse(d, "rem of floats");
  }
}

}  // namespace fused_peft::sim
