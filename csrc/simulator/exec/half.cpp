// f16 and bf16 arithmetic, single and in pairs: add sub mul fma abs neg min max.
//
// add, sub and mul are done in single precision, whose 24 bits are enough for the second rounding
// to change nothing (24 >= 2 * 11 + 2, Figueroa 1995); fma in double precision, rounded to odd on
// the way.
#include "simulator/exec/half.h"

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/rounding.h"

namespace fused_peft::sim {
namespace {

struct Add {
  float operator()(float a, float b) const { return a + b; }
};
struct Sub {
  float operator()(float a, float b) const { return a - b; }
};
struct Mul {
  float operator()(float a, float b) const { return a * b; }
};
struct Fma {
  float operator()(float a, float b, float c) const {
    // The product is exact; the sum's error (Knuth's two-sum) tells which way it was rounded.
    const double product = double{a} * double{b};
    const double addend = c;
    const double sum = product + addend;
    const double shadow = sum - product;
    const double error = (product - (sum - shadow)) + (addend - shadow);
    auto bits = std::bit_cast<int64_t>(sum);
    const bool inexact = error != 0.0 && error == error;
    const int64_t toward = ((error > 0.0) == (sum > 0.0)) ? 1 : -1;
    bits += inexact && (bits & 1) == 0 ? toward : 0;
    return round_to_odd(std::bit_cast<double>(bits));
  }
};
// As in float.cpp, on values that are exact in single precision.
template <bool kMax, bool kNan, bool kXorSign>
struct Extremum {
  float operator()(float a, float b) const {
    const uint32_t sign = (bits_of(a) ^ bits_of(b)) & 0x80000000;
    if (kXorSign) a = std::abs(a), b = std::abs(b);
    float value = (kMax ? a > b : a < b) ? a : b;
    const uint32_t equal = kMax ? bits_of(a) & bits_of(b) : bits_of(a) | bits_of(b);
    value = a == b ? float_of(equal) : value;
    value = a != a ? b : value;
    value = b != b ? a : value;
    const bool nan = kNan ? (a != a) | (b != b) : (a != a) & (b != b);
    if (kXorSign) value = float_of(bits_of(value) | sign);
    return nan ? float_of(F32Format::kNan) : value;
  }
};

// Instr::variant of the handlers below.
enum HalfFlags : uint32_t { kFlush = 1, kSaturate = 2, kClampNegative = 4 };

inline uint16_t flush_half(uint16_t bits) { return (bits & 0x7c00) == 0 ? bits & 0x8000 : bits; }

// Op on kCount halves (32, or 64 in pairs).
template <class Lanes, class Op, int kCount, int kSources>
Step half_elementwise(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) float values[kSources][kCount];
  alignas(64) uint16_t out[kCount];
  const uint32_t flags = instr.variant;
  for (int i = 0; i < kSources; ++i) {
    const auto* source = lanes_of<uint16_t>(warp, instr.source(i));
    if (flags & kFlush) {
      for (int lane = 0; lane < kCount; ++lane) out[lane] = flush_half(source[lane]);
      source = out;
    }
    Lanes::from(source, values[i], kCount);
  }
  for (int lane = 0; lane < kCount; ++lane) {
    if constexpr (kSources == 2) {
      values[0][lane] = Op()(values[0][lane], values[1][lane]);
    } else {
      values[0][lane] = Op()(values[0][lane], values[1][lane], values[2][lane]);
    }
  }
  if (flags & kSaturate) {
    for (float& value : values[0]) value = saturate(value);
  }
  if (flags & kClampNegative) {
    for (float& value : values[0]) value = value <= 0.0f ? 0.0f : value;
  }
  Lanes::to(values[0], out, kCount);
  if (flags & kFlush) {
    for (uint16_t& bits : out) bits = flush_half(bits);
  }
  using Element = std::conditional_t<kCount == kLanes, uint16_t, uint32_t>;
  alignas(64) Element packed[kLanes];
  std::memcpy(packed, out, sizeof packed);
  store_lanes(dest_lanes<Element>(warp, instr.dest(0)), packed, mask);
  return Step::kNext;
}

template <class Op, int kSources>
void set_handler(Decoding& d, Type type) {
  Handler handler = nullptr;
  switch (type) {
    case Type::kF16: handler = half_elementwise<F16Lanes, Op, kLanes, kSources>; break;
    case Type::kBF16: handler = half_elementwise<BF16Lanes, Op, kLanes, kSources>; break;
    case Type::kF16x2: handler = half_elementwise<F16Lanes, Op, 2 * kLanes, kSources>; break;
    case Type::kBF16x2: handler = half_elementwise<BF16Lanes, Op, 2 * kLanes, kSources>; break;
    default: refuse(d, std::string("type ") + name_of(type));
  }
  d.handler(handler, InstrClass::kHalf);
}

template <class Op, int kSources>
void decode_rounded(Decoding& d, bool allow_relu) {
  if (take_rounding(d) != Rounding::kNearestEven) refuse_malformed(d, "halves round to nearest");
  uint32_t flags = 0;
  if (d.take(".ftz")) flags |= kFlush;
  if (d.take(".sat")) flags |= kSaturate;
  if (allow_relu && d.take(".relu")) flags |= kClampNegative;
  const Type type = d.need_type();
  if ((flags & (kFlush | kSaturate)) && (type == Type::kBF16 || type == Type::kBF16x2)) {
    refuse_malformed(d, ".ftz and .sat are for .f16 and .f16x2");
  }
  take_operands(d, type, kSources);
  set_handler<Op, kSources>(d, type);
  d.instr().variant = flags;
}

template <bool kMax>
void decode_extremum(Decoding& d) {
  const uint32_t flags = d.take(".ftz") ? uint32_t{kFlush} : 0;
  const bool nan = d.take(".NaN"), xorsign = d.take(".xorsign");
  if (xorsign && !d.take(".abs")) refuse_malformed(d, ".xorsign comes with .abs");
  const Type type = d.need_type();
  take_operands(d, type, 2);
  if (nan) {
    xorsign ? set_handler<Extremum<kMax, true, true>, 2>(d, type)
            : set_handler<Extremum<kMax, true, false>, 2>(d, type);
  } else {
    xorsign ? set_handler<Extremum<kMax, false, true>, 2>(d, type)
            : set_handler<Extremum<kMax, false, false>, 2>(d, type);
  }
  d.instr().variant = flags;
}

// Sign bits are cleared or flipped; NaNs pass as they are.
template <bool kNegate, bool kFtz, class Element>
struct SignOp {
  Element operator()(Element bits) const {
    Element out = 0;
    for (unsigned shift = 0; shift < 8 * sizeof(Element); shift += 16) {
      auto half = uint16_t(bits >> shift);
      if (kFtz) half = flush_half(half);
      half = kNegate ? half ^ 0x8000 : half & 0x7fff;
      out |= Element(Element(half) << shift);
    }
    return out;
  }
};

template <bool kNegate>
void decode_sign(Decoding& d) {
  const bool ftz = d.take(".ftz");
  const Type type = d.need_type();
  if (ftz && (type == Type::kBF16 || type == Type::kBF16x2)) {
    refuse_malformed(d, ".ftz is for .f16 and .f16x2");
  }
  take_operands(d, type, 1);
  if (bytes_of(type) == 2) {
    d.handler(ftz ? elementwise<SignOp<kNegate, true, uint16_t>, uint16_t, uint16_t>
                  : elementwise<SignOp<kNegate, false, uint16_t>, uint16_t, uint16_t>,
              InstrClass::kHalf);
  } else {
    d.handler(ftz ? elementwise<SignOp<kNegate, true, uint32_t>, uint32_t, uint32_t>
                  : elementwise<SignOp<kNegate, false, uint32_t>, uint32_t, uint32_t>,
              InstrClass::kHalf);
  }
}

}  // namespace

void decode_half_arithmetic(Decoding& d, Arithmetic op) {
  if (d.has(".f32")) refuse(d, "mixed precision (sm_100)");
  switch (op) {
    case Arithmetic::kAdd: return decode_rounded<Add, 2>(d, false);
    case Arithmetic::kSub: return decode_rounded<Sub, 2>(d, false);
    case Arithmetic::kMul: return decode_rounded<Mul, 2>(d, false);
    case Arithmetic::kFma: return decode_rounded<Fma, 3>(d, true);
    case Arithmetic::kAbs: return decode_sign<false>(d);
    case Arithmetic::kNeg: return decode_sign<true>(d);
    case Arithmetic::kMin: return decode_extremum<false>(d);
    case Arithmetic::kMax: return decode_extremum<true>(d);
    case Arithmetic::kMad:
    case Arithmetic::kDiv:
    case Arithmetic::kRem: refuse(d, "this operation of halves");
  }
}

}  // namespace fused_peft::sim
