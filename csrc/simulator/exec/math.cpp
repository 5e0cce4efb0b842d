// Reciprocals, roots and elementary functions: rcp sqrt rsqrt ex2 lg2 sin cos tanh.
#include "simulator/exec/math.h"

#include <iterator>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/half.h"
#include "simulator/exec/rounding.h"

namespace fused_peft::sim {
namespace {

template <class Op, bool kFtz>
struct OfFloat {
  float operator()(float a) const {
    return kFtz ? flush(canonical(Op()(flush(a)))) : canonical(Op()(a));
  }
};

struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return T(1) / a;
  }
};
struct SquareRoot {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct ReciprocalRoot {
  double operator()(double a) const { return 1.0 / std::sqrt(a); }
  float operator()(float a) const { return static_cast<float>(1.0 / std::sqrt(double{a})); }
};
struct Exp2 {
  float operator()(float a) const { return exp2_approx(a); }
};
struct Log2 {
  float operator()(float a) const { return log2_approx(a); }
};
struct Tanh {
  float operator()(float a) const { return tanh_approx(a); }
};

template <class Op>
Handler float_handler(bool ftz) {
  return ftz ? elementwise<OfFloat<Op, true>, float, float>
             : elementwise<OfFloat<Op, false>, float, float>;
}

// The instructions that start double-precision reciprocals: the low word of the source is not
// looked at, that of the result is zero, subnormals are flushed.
template <class Op>
struct HighWord {
  double operator()(double a) const {
    uint64_t bits = std::bit_cast<uint64_t>(a) & 0xffffffff00000000;
    if ((bits & F64Format::kInfinity) == 0) bits &= uint64_t{1} << 63;
    const double value = Op()(std::bit_cast<double>(bits));
    uint64_t result = std::bit_cast<uint64_t>(value);
    if (value != value) return std::bit_cast<double>(uint64_t{0x7fffffff00000000});
    result = (result + 0x80000000) & 0xffffffff00000000;
    if ((result & F64Format::kInfinity) == 0) result &= uint64_t{1} << 63;
    return std::bit_cast<double>(result);
  }
};

// rcp and sqrt: .approx, or IEEE in any rounding mode.
template <class Op>
void decode_root(Decoding& d) {
  const bool approx = d.take(".approx");
  const Rounding rounding = take_rounding(d);
  const bool ftz = d.take(".ftz");
  const Type type = d.need_type();
  take_operands(d, type, 1);
  Handler handler;
  if (type == Type::kF64) {
    if (approx != ftz) refuse_malformed(d, "of .f64 there are .approx.ftz and the rounded form");
    constexpr Handler kNearest = elementwise<Op, double, double>;
    handler = rounding == Rounding::kNearestEven ? kNearest : in_rounding_mode<kNearest>;
    if (approx) handler = elementwise<HighWord<Op>, double, double>;
  } else if (rounding == Rounding::kNearestEven) {
    handler = float_handler<Op>(ftz);
  } else {
    handler = ftz ? in_rounding_mode<elementwise<OfFloat<Op, true>, float, float>>
                  : in_rounding_mode<elementwise<OfFloat<Op, false>, float, float>>;
  }
  d.handler(handler, InstrClass::kMath);
  d.instr().variant = uint32_t(rounding);
}

void decode_rsqrt(Decoding& d) {
  if (!d.take(".approx")) refuse_malformed(d, "rsqrt needs .approx");
  const bool ftz = d.take(".ftz");
  const Type type = d.need_type();
  take_operands(d, type, 1);
  if (type == Type::kF64) {
    d.handler(ftz ? elementwise<HighWord<ReciprocalRoot>, double, double>
                  : elementwise<ReciprocalRoot, double, double>,
              InstrClass::kMath);
  } else {
    d.handler(float_handler<ReciprocalRoot>(ftz), InstrClass::kMath);
  }
}

// Op on kCount halves (32, or 64 in pairs); variant: flush subnormals.
template <class Lanes, class Op, int kCount>
Step of_halves(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) float values[kCount];
  alignas(64) uint16_t out[kCount];
  std::memcpy(out, lanes_of<uint16_t>(warp, instr.source(0)), sizeof out);
  const auto flush_all = [&] {
    constexpr uint16_t kExponent = Lanes::Format::kInfinity;
    for (uint16_t& bits : out) bits = (bits & kExponent) == 0 ? bits & 0x8000 : bits;
  };
  if (instr.variant) flush_all();
  Lanes::from(out, values, kCount);
  for (float& value : values) value = Op()(value);
  Lanes::to(values, out, kCount);
  if (instr.variant) flush_all();
  using Element = std::conditional_t<kCount == kLanes, uint16_t, uint32_t>;
  alignas(64) Element packed[kLanes];
  std::memcpy(packed, out, sizeof packed);
  store_lanes(dest_lanes<Element>(warp, instr.dest(0)), packed, mask);
  return Step::kNext;
}

// ex2, tanh, lg2 of single precision, and where kHalves of the half formats.
template <class Op, bool kHalves>
void decode_function(Decoding& d) {
  if (!d.take(".approx")) refuse_malformed(d, "the instruction needs .approx");
  const bool ftz = d.take(".ftz");
  const Type type = d.need_type();
  take_operands(d, type, 1);
  Handler handler = nullptr;
  if (type == Type::kF32) {
    handler = float_handler<Op>(ftz);
  } else if (kHalves) {
    switch (type) {
      case Type::kF16: handler = of_halves<F16Lanes, Op, kLanes>; break;
      case Type::kF16x2: handler = of_halves<F16Lanes, Op, 2 * kLanes>; break;
      case Type::kBF16: handler = of_halves<BF16Lanes, Op, kLanes>; break;
      case Type::kBF16x2: handler = of_halves<BF16Lanes, Op, 2 * kLanes>; break;
      default: break;
    }
  }
  if (handler == nullptr) refuse(d, std::string("type ") + name_of(type));
  d.handler(handler, InstrClass::kMath);
  d.instr().variant = ftz;
}

// kQuarter 0: sin, 1: cos.
template <uint64_t kQuarter, bool kFtz>
Step sine(Warp& warp, const Instr& instr, LaneMask mask) {
  const float* source = lanes_of<float>(warp, instr.source(0));
  alignas(64) float out[kLanes];
  bool large = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float x = kFtz ? flush(source[lane]) : source[lane];
    out[lane] = sine_approx(x, kQuarter);
    large |= std::abs(x) > kMaxReduced;
  }
  for (int lane = 0; large && lane < kLanes; ++lane) {
    const float x = source[lane];
    if (std::abs(x) <= kMaxReduced || x - x != 0.0f) continue;
    out[lane] = static_cast<float>(kQuarter ? std::cos(double{x}) : std::sin(double{x}));
  }
  if (kFtz) {
    for (float& value : out) value = flush(value);
  }
  store_lanes(dest_lanes<float>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

template <uint64_t kQuarter>
void decode_sine(Decoding& d) {
  if (!d.take(".approx")) refuse_malformed(d, "the instruction needs .approx");
  const bool ftz = d.take(".ftz");
  if (!d.take(".f32")) refuse_malformed(d, "the type is .f32");
  take_operands(d, Type::kF32, 1);
  d.handler(ftz ? sine<kQuarter, true> : sine<kQuarter, false>, InstrClass::kMath);
}

constexpr Opcode kOpcodes[] = {
    {"rcp", decode_root<Reciprocal>},
    {"sqrt", decode_root<SquareRoot>},
    {"rsqrt", decode_rsqrt},
    {"ex2", decode_function<Exp2, true>},
    {"lg2", decode_function<Log2, false>},
    {"tanh", decode_function<Tanh, true>},
    {"sin", decode_sine<0>},
    {"cos", decode_sine<1>},
};

}  // namespace

const OpcodeFamily kMathFamily = {"math", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
