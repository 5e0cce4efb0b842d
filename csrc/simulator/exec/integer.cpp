// Integer arithmetic: add sub mul mad div rem abs neg min max, and add/min/max of packed 16-bit
// pairs.
#include <type_traits>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/numeric.h"

namespace fused_peft::sim {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Twice as wide.
template <class T>
struct WiderOf;
template <>
struct WiderOf<int16_t> {
  using Type = int32_t;
};
template <>
struct WiderOf<uint16_t> {
  using Type = uint32_t;
};
template <>
struct WiderOf<int32_t> {
  using Type = int64_t;
};
template <>
struct WiderOf<uint32_t> {
  using Type = uint64_t;
};
template <>
struct WiderOf<int64_t> {
  using Type = __int128;
};
template <>
struct WiderOf<uint64_t> {
  using Type = unsigned __int128;
};
template <class T>
using Wider = typename WiderOf<T>::Type;

// Arithmetic wraps: it is done in the unsigned type, widened so that promotion to int cannot
// overflow.
template <class T>
using Wrapping = std::conditional_t<sizeof(T) < 4, uint32_t, Unsigned<T>>;

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return T(Wrapping<T>(a) + Wrapping<T>(b));
  }
};
struct Sub {
  template <class T>
  static T apply(T a, T b) {
    return T(Wrapping<T>(a) - Wrapping<T>(b));
  }
};
struct MulLow {
  template <class T>
  static T apply(T a, T b) {
    return T(Wrapping<T>(a) * Wrapping<T>(b));
  }
};
struct MulHigh {
  template <class T>
  static T apply(T a, T b) {
    return T((Wider<T>(a) * Wider<T>(b)) >> (8 * sizeof(T)));
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
// What a division by zero gives is the machine's own; NVIDIA's gives all ones, and the remainder is
// the dividend.
struct Div {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return T(~Wrapping<T>(0));
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - Wrapping<T>(a));
    return T(a / b);
  }
};
struct Rem {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Neg {
  template <class T>
  static T apply(T a) {
    return T(0 - Wrapping<T>(a));
  }
};
struct Abs {
  template <class T>
  static T apply(T a) {
    return a < 0 ? T(0 - Wrapping<T>(a)) : a;
  }
};

// Op of both halves of a 32-bit word.
template <class Op, class Half>
struct Packed {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    const Half low = Op::template apply<Half>(Half(a), Half(b));
    const Half high = Op::template apply<Half>(Half(a >> 16), Half(b >> 16));
    return uint32_t(uint16_t(low)) | uint32_t(uint16_t(high)) << 16;
  }
};

template <class Op>
struct Relu {
  template <class T>
  static T apply(T a, T b) {
    return Max::apply<T>(Op::template apply<T>(a, b), 0);
  }
};

template <class Op, class T>
struct Binary {
  T operator()(T a, T b) const { return Op::template apply<T>(a, b); }
};
template <class Op, class T>
struct Unary {
  T operator()(T a) const { return Op::template apply<T>(a); }
};
template <class Op, class T>
struct MultiplyAdd {
  T operator()(T a, T b, T c) const { return Add::apply<T>(Op::template apply<T>(a, b), c); }
};
template <class T>
struct MulWide {
  Wider<T> operator()(T a, T b) const { return Wider<T>(a) * Wider<T>(b); }
};
template <class T>
struct MadWide {
  Wider<T> operator()(T a, T b, Wider<T> c) const {
    return Add::apply<Wider<T>>(Wider<T>(a) * Wider<T>(b), c);
  }
};

struct AddSaturating {
  int32_t operator()(int32_t a, int32_t b) const { return clamp_to_s32(int64_t{a} + b); }
};
struct SubSaturating {
  int32_t operator()(int32_t a, int32_t b) const { return clamp_to_s32(int64_t{a} - b); }
};
struct MadHighSaturating {
  int32_t operator()(int32_t a, int32_t b, int32_t c) const {
    return clamp_to_s32(int64_t{MulHigh::apply<int32_t>(a, b)} + c);
  }
};

// fn(T()) with the C++ type of a PTX integer type.
template <class Fn>
Handler with_integer(Decoding& d, Type type, Fn fn) {
  switch (type) {
    case Type::kU16: return fn(uint16_t{});
    case Type::kS16: return fn(int16_t{});
    case Type::kU32: return fn(uint32_t{});
    case Type::kS32: return fn(int32_t{});
    case Type::kU64: return fn(uint64_t{});
    case Type::kS64: return fn(int64_t{});
    default: refuse(d, std::string("type ") + name_of(type));
  }
}

template <class Op>
Handler binary_handler(Decoding& d, Type type) {
  return with_integer(d, type,
                      []<class T>(T) -> Handler { return elementwise<Binary<Op, T>, T, T, T>; });
}

template <class Op>
void decode_binary(Decoding& d, Type type) {
  take_operands(d, type, 2);
  if (type == Type::kU16x2) {
    d.handler(elementwise<Packed<Op, uint16_t>, uint32_t, uint32_t, uint32_t>,
              InstrClass::kInteger);
  } else if (type == Type::kS16x2) {
    d.handler(elementwise<Packed<Op, int16_t>, uint32_t, uint32_t, uint32_t>, InstrClass::kInteger);
  } else {
    d.handler(binary_handler<Op>(d, type), InstrClass::kInteger);
  }
}

// min and max may clamp at zero.
template <class Op>
void decode_min_max(Decoding& d, Type type) {
  if (!d.take(".relu")) return decode_binary<Op>(d, type);
  take_operands(d, type, 2);
  if (type == Type::kS16x2) {
    d.handler(elementwise<Packed<Relu<Op>, int16_t>, uint32_t, uint32_t, uint32_t>,
              InstrClass::kInteger);
  } else if (type == Type::kS32) {
    d.handler(elementwise<Binary<Relu<Op>, int32_t>, int32_t, int32_t, int32_t>,
              InstrClass::kInteger);
  } else {
    refuse_malformed(d, ".relu is for .s32 and .s16x2");
  }
}

template <class Op>
void decode_unary(Decoding& d, Type type) {
  if (!is_signed(type)) refuse_malformed(d, "the type must be signed");
  take_operands(d, type, 1);
  d.handler(
      with_integer(d, type, []<class T>(T) -> Handler { return elementwise<Unary<Op, T>, T, T>; }),
      InstrClass::kInteger);
}

template <class Op>
void decode_saturating(Decoding& d, Type type, int sources) {
  if (type != Type::kS32) refuse_malformed(d, ".sat is for .s32");
  take_operands(d, type, sources);
  if constexpr (std::is_same_v<Op, MadHighSaturating>) {
    d.handler(elementwise<Op, int32_t, int32_t, int32_t, int32_t>, InstrClass::kInteger);
  } else {
    d.handler(elementwise<Op, int32_t, int32_t, int32_t>, InstrClass::kInteger);
  }
}

Type wider_type(Decoding& d, Type type) {
  switch (type) {
    case Type::kU16: return Type::kU32;
    case Type::kS16: return Type::kS32;
    case Type::kU32: return Type::kU64;
    case Type::kS32: return Type::kS64;
    default: refuse_malformed(d, ".wide is for 16 and 32 bits");
  }
}

void decode_wide(Decoding& d, Type type, bool add) {
  const Type wider = wider_type(d, type);
  d.dest(wider);
  d.source(type);
  d.source(type);
  if (add) d.source(wider);
  d.handler(with_integer(d, type,
                         [add]<class T>(T) -> Handler {
                           if constexpr (sizeof(T) > 4) {
                             return nullptr;  // wider_type has refused it
                           } else if (add) {
                             return elementwise<MadWide<T>, Wider<T>, T, T, Wider<T>>;
                           } else {
                             return elementwise<MulWide<T>, Wider<T>, T, T>;
                           }
                         }),
            InstrClass::kInteger);
}

void decode_mul(Decoding& d, Type type) {
  const std::string_view part = d.take_one({".lo", ".hi", ".wide"});
  if (part == ".wide") return decode_wide(d, type, false);
  if (part == ".hi") return decode_binary<MulHigh>(d, type);
  if (part != ".lo") refuse_malformed(d, "mul of integers needs .lo, .hi or .wide");
  decode_binary<MulLow>(d, type);
}

void decode_mad(Decoding& d, Type type) {
  const std::string_view part = d.take_one({".lo", ".hi", ".wide"});
  if (part == ".wide") return decode_wide(d, type, true);
  if (part == ".hi" && d.take(".sat")) return decode_saturating<MadHighSaturating>(d, type, 3);
  if (part.empty()) refuse_malformed(d, "mad of integers needs .lo, .hi or .wide");
  take_operands(d, type, 3);
  const bool high = part == ".hi";
  d.handler(with_integer(d, type,
                         [high]<class T>(T) -> Handler {
                           return high ? elementwise<MultiplyAdd<MulHigh, T>, T, T, T, T>
                                       : elementwise<MultiplyAdd<MulLow, T>, T, T, T, T>;
                         }),
            InstrClass::kInteger);
}

}  // namespace

void decode_integer_arithmetic(Decoding& d, Arithmetic op) {
  const bool saturating = (op == Arithmetic::kAdd || op == Arithmetic::kSub) && d.take(".sat");
  const Type type = d.need_type();
  switch (op) {
    case Arithmetic::kAdd:
      return saturating ? decode_saturating<AddSaturating>(d, type, 2)
                        : decode_binary<Add>(d, type);
    case Arithmetic::kSub:
      return saturating ? decode_saturating<SubSaturating>(d, type, 2)
                        : decode_binary<Sub>(d, type);
    case Arithmetic::kMul: return decode_mul(d, type);
    case Arithmetic::kMad: return decode_mad(d, type);
    case Arithmetic::kDiv: return decode_binary<Div>(d, type);
    case Arithmetic::kRem: return decode_binary<Rem>(d, type);
    case Arithmetic::kAbs: return decode_unary<Abs>(d, type);
    case Arithmetic::kNeg: return decode_unary<Neg>(d, type);
    case Arithmetic::kMin: return decode_min_max<Min>(d, type);
    case Arithmetic::kMax: return decode_min_max<Max>(d, type);
    case Arithmetic::kFma: refuse(d, "fma of integers");
  }
}

}  // namespace fused_peft::sim
