// Logic, shifts and bit fields: and or xor not cnot shl shr shf bfe bfi bfind brev popc clz fns
// bmsk szext.
#include <bit>
#include <iterator>
#include <type_traits>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/logic.h"

namespace fused_peft::sim {
namespace {

// ---- and or xor not

template <class T>
struct And {
  T operator()(T a, T b) const { return a & b; }
};
template <class T>
struct Or {
  T operator()(T a, T b) const { return a | b; }
};
template <class T>
struct Xor {
  T operator()(T a, T b) const { return a ^ b; }
};
template <class T>
struct Not {
  T operator()(T a) const { return T(~a); }
};
template <class T>
struct LogicalNot {
  T operator()(T a) const { return a == 0; }
};

template <BoolOp kOp>
Step combine_predicates(Warp& warp, const Instr& instr, LaneMask mask) {
  const PredicateLanes result =
      combine(kOp, predicate_lanes(warp, instr.source(0)), predicate_lanes(warp, instr.source(1)));
  set_predicate(warp, instr.dest(0), mask, result.value);
  set_valid(warp, instr.dest(0), mask, result.valid);
  return Step::kNext;
}

Step not_predicate(Warp& warp, const Instr& instr, LaneMask mask) {
  set_predicate(warp, instr.dest(0), mask, ~predicate(warp, instr.source(0)));
  return Step::kNext;
}

template <template <class> class Op, BoolOp kOp>
void decode_logic(Decoding& d) {
  const Type type = d.need_type();
  take_operands(d, type, 2);
  if (type == Type::kPred) {
    d.handler(combine_predicates<kOp>, InstrClass::kPredicate, kOwnValidity);
    return;
  }
  d.handler(with_width(d, type, []<class T>(T) -> Handler { return elementwise<Op<T>, T, T, T>; }),
            InstrClass::kInteger);
}

void decode_not(Decoding& d) {
  const Type type = d.need_type();
  take_operands(d, type, 1);
  if (type == Type::kPred) return d.handler(not_predicate, InstrClass::kPredicate);
  d.handler(with_width(d, type, []<class T>(T) -> Handler { return elementwise<Not<T>, T, T>; }),
            InstrClass::kInteger);
}

void decode_cnot(Decoding& d) {
  const Type type = d.need_type();
  take_operands(d, type, 1);
  d.handler(
      with_width(d, type, []<class T>(T) -> Handler { return elementwise<LogicalNot<T>, T, T>; }),
      InstrClass::kInteger);
}

// ---- shifts: amounts are 32 bits wide and clamped to the width

template <class T>
struct ShiftLeft {
  T operator()(T a, uint32_t amount) const {
    constexpr uint32_t kWidth = 8 * sizeof(T);
    using Wide = std::conditional_t<sizeof(T) == 2, uint32_t, T>;
    return amount < kWidth ? T(Wide(a) << (amount & (kWidth - 1))) : T(0);
  }
};
template <class T>
struct ShiftRight {
  T operator()(T a, uint32_t amount) const {
    constexpr uint32_t kWidth = 8 * sizeof(T);
    if (std::is_signed_v<T>) return T(a >> (amount < kWidth ? amount : kWidth - 1));
    return amount < kWidth ? T(a >> (amount & (kWidth - 1))) : T(0);
  }
};

void decode_shl(Decoding& d) {
  const Type type = d.need_type();
  d.dest(type);
  d.source(type);
  d.source(Type::kU32);
  d.handler(
      with_width(d, type,
                 []<class T>(T) -> Handler { return elementwise<ShiftLeft<T>, T, T, uint32_t>; }),
      InstrClass::kInteger);
}

void decode_shr(Decoding& d) {
  const Type type = d.need_type();
  d.dest(type);
  d.source(type);
  d.source(Type::kU32);
  const bool arithmetic = is_signed(type);
  d.handler(with_width(d, type,
                       [arithmetic]<class T>(T) -> Handler {
                         using Signed = std::make_signed_t<T>;
                         return arithmetic
                                    ? elementwise<ShiftRight<Signed>, Signed, Signed, uint32_t>
                                    : elementwise<ShiftRight<T>, T, T, uint32_t>;
                       }),
            InstrClass::kInteger);
}

// The funnel shift of b:a (b the high word).
template <bool kLeft, bool kClamp>
struct Funnel {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t amount) const {
    const uint32_t n = kClamp ? (amount < 32 ? amount : 32) : amount & 31;
    const uint64_t both = uint64_t{b} << 32 | a;
    return kLeft ? uint32_t((both << n) >> 32) : uint32_t(both >> n);
  }
};

void decode_shf(Decoding& d) {
  const std::string_view direction = d.take_one({".l", ".r"});
  const std::string_view mode = d.take_one({".clamp", ".wrap"});
  if (direction.empty() || mode.empty()) refuse_malformed(d, "shf needs .l or .r, .clamp or .wrap");
  if (!d.take(".b32")) refuse_malformed(d, "shf is of .b32");
  take_operands(d, Type::kB32, 3);
  using W = uint32_t;
  const bool clamp = mode == ".clamp";
  if (direction == ".l") {
    d.handler(clamp ? elementwise<Funnel<true, true>, W, W, W, W>
                    : elementwise<Funnel<true, false>, W, W, W, W>,
              InstrClass::kInteger);
  } else {
    d.handler(clamp ? elementwise<Funnel<false, true>, W, W, W, W>
                    : elementwise<Funnel<false, false>, W, W, W, W>,
              InstrClass::kInteger);
  }
}

// ---- bit fields

template <class T>
constexpr uint32_t kWidthOf = 8 * sizeof(T);

template <class T>
struct ExtractField {
  T operator()(T a, uint32_t position, uint32_t length) const {
    using U = std::make_unsigned_t<T>;
    constexpr uint32_t kWidth = kWidthOf<T>;
    const uint32_t pos = position & 0xff, len = length & 0xff;
    if (len == 0) return 0;
    const uint32_t top = pos + len - 1 < kWidth - 1 ? pos + len - 1 : kWidth - 1;
    const bool sign = std::is_signed_v<T> && (U(a) >> top & 1);
    U field = pos < kWidth ? U(U(a) >> pos) : U(0);
    // Bits of the register that the field has: those above are copies of the sign bit.
    const uint32_t have = pos >= kWidth ? 0 : (len < kWidth - pos ? len : kWidth - pos);
    const U mask = have >= kWidth ? ~U(0) : U((U(1) << have) - 1);
    field &= mask;
    return T(sign ? field | ~mask : field);
  }
};

template <class T>
struct InsertField {
  T operator()(T a, T b, uint32_t position, uint32_t length) const {
    constexpr uint32_t kWidth = kWidthOf<T>;
    const uint32_t pos = position & 0xff, len = length & 0xff;
    if (pos >= kWidth || len == 0) return b;
    const T mask = len >= kWidth ? T(~T(0)) : T((T(1) << len) - 1);
    return T((b & ~T(mask << pos)) | T((a & mask) << pos));
  }
};

void decode_bfe(Decoding& d) {
  const Type type = d.need_type();
  d.dest(type);
  d.source(type);
  d.source(Type::kU32);
  d.source(Type::kU32);
  Handler handler;
  switch (type) {
    case Type::kU32:
      handler = elementwise<ExtractField<uint32_t>, uint32_t, uint32_t, uint32_t, uint32_t>;
      break;
    case Type::kS32:
      handler = elementwise<ExtractField<int32_t>, int32_t, int32_t, uint32_t, uint32_t>;
      break;
    case Type::kU64:
      handler = elementwise<ExtractField<uint64_t>, uint64_t, uint64_t, uint32_t, uint32_t>;
      break;
    case Type::kS64:
      handler = elementwise<ExtractField<int64_t>, int64_t, int64_t, uint32_t, uint32_t>;
      break;
    default: refuse_malformed(d, "bfe is of 32 and 64 bits");
  }
  d.handler(handler, InstrClass::kInteger);
}

void decode_bfi(Decoding& d) {
  const Type type = d.need_type();
  if (type != Type::kB32 && type != Type::kB64) refuse_malformed(d, "bfi is of .b32 or .b64");
  take_operands(d, type, 2);
  d.source(Type::kU32);
  d.source(Type::kU32);
  d.handler(
      type == Type::kB32
          ? elementwise<InsertField<uint32_t>, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>
          : elementwise<InsertField<uint64_t>, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>,
      InstrClass::kInteger);
}

template <class T, bool kShiftAmount>
struct FindTop {
  uint32_t operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    const U bits = std::is_signed_v<T> && a < 0 ? ~U(a) : U(a);
    if (bits == 0) return 0xffffffffu;
    const auto zeros = uint32_t(std::countl_zero(bits));
    return kShiftAmount ? zeros : kWidthOf<T> - 1 - zeros;
  }
};

template <class T>
Handler find_top_handler(bool shift_amount) {
  return shift_amount ? elementwise<FindTop<T, true>, uint32_t, T>
                      : elementwise<FindTop<T, false>, uint32_t, T>;
}

void decode_bfind(Decoding& d) {
  const bool shift_amount = d.take(".shiftamt");
  const Type type = d.need_type();
  d.dest(Type::kU32);
  d.source(type);
  Handler handler;
  switch (type) {
    case Type::kU32: handler = find_top_handler<uint32_t>(shift_amount); break;
    case Type::kS32: handler = find_top_handler<int32_t>(shift_amount); break;
    case Type::kU64: handler = find_top_handler<uint64_t>(shift_amount); break;
    case Type::kS64: handler = find_top_handler<int64_t>(shift_amount); break;
    default: refuse_malformed(d, "bfind is of 32 and 64 bits");
  }
  d.handler(handler, InstrClass::kInteger);
}

template <class T>
struct Popcount {
  uint32_t operator()(T a) const { return uint32_t(std::popcount(a)); }
};
template <class T>
struct LeadingZeros {
  uint32_t operator()(T a) const { return uint32_t(std::countl_zero(a)); }
};
template <class T>
struct Reverse {
  T operator()(T a) const {
    constexpr auto kEvery2 = T(0x5555555555555555u), kEvery4 = T(0x3333333333333333u),
                   kEvery8 = T(0x0f0f0f0f0f0f0f0fu);
    a = (a >> 1 & kEvery2) | (a & kEvery2) << 1;
    a = (a >> 2 & kEvery4) | (a & kEvery4) << 2;
    a = (a >> 4 & kEvery8) | (a & kEvery8) << 4;
    if constexpr (sizeof(T) == 8) return __builtin_bswap64(a);
    return T(__builtin_bswap32(uint32_t(a)));
  }
};

template <template <class> class Op>
void decode_count(Decoding& d) {
  const Type type = d.need_type();
  if (type != Type::kB32 && type != Type::kB64) refuse_malformed(d, "the type is .b32 or .b64");
  d.dest(Type::kU32);
  d.source(type);
  d.handler(type == Type::kB32 ? elementwise<Op<uint32_t>, uint32_t, uint32_t>
                               : elementwise<Op<uint64_t>, uint32_t, uint64_t>,
            InstrClass::kInteger);
}

void decode_brev(Decoding& d) {
  const Type type = d.need_type();
  if (type != Type::kB32 && type != Type::kB64) refuse_malformed(d, "brev is of .b32 or .b64");
  take_operands(d, type, 1);
  d.handler(type == Type::kB32 ? elementwise<Reverse<uint32_t>, uint32_t, uint32_t>
                               : elementwise<Reverse<uint64_t>, uint64_t, uint64_t>,
            InstrClass::kInteger);
}

// The n-th set bit from `base` on, upward for a positive n.
struct FindNthSet {
  uint32_t operator()(uint32_t mask, uint32_t base, int32_t offset) const {
    if (base > 31) return 0xffffffffu;
    if (offset == 0) return mask >> base & 1 ? base : 0xffffffffu;
    int64_t count = offset > 0 ? int64_t{offset} : -int64_t{offset};
    for (int32_t pos = int32_t(base); pos >= 0 && pos < 32; pos += offset > 0 ? 1 : -1) {
      if ((mask >> pos & 1) && --count == 0) return uint32_t(pos);
    }
    return 0xffffffffu;
  }
};

void decode_fns(Decoding& d) {
  if (!d.take(".b32")) refuse_malformed(d, "fns is of .b32");
  d.dest(Type::kB32);
  d.source(Type::kB32);
  d.source(Type::kB32);
  d.source(Type::kS32);
  d.handler(elementwise<FindNthSet, uint32_t, uint32_t, uint32_t, int32_t>, InstrClass::kInteger);
}

template <bool kClamp>
struct BitMask {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    const uint64_t position = kClamp ? (a < 32 ? a : 32) : a & 31;
    const uint64_t width = kClamp ? (b < 32 ? b : 32) : b & 31;
    return uint32_t(((uint64_t{1} << width) - 1) << position);
  }
};

void decode_bmsk(Decoding& d) {
  const std::string_view mode = d.take_one({".clamp", ".wrap"});
  if (mode.empty() || !d.take(".b32")) refuse_malformed(d, "bmsk needs .clamp or .wrap and .b32");
  take_operands(d, Type::kB32, 2);
  d.handler(mode == ".clamp" ? elementwise<BitMask<true>, uint32_t, uint32_t, uint32_t>
                             : elementwise<BitMask<false>, uint32_t, uint32_t, uint32_t>,
            InstrClass::kInteger);
}

template <bool kClamp, bool kSigned>
struct Extend {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    if (kClamp && b >= 32) return a;
    const uint32_t width = b & 31;
    if (width == 0) return 0;
    const uint32_t shift = 32 - width;
    return kSigned ? uint32_t(int32_t(a << shift) >> shift) : a << shift >> shift;
  }
};

void decode_szext(Decoding& d) {
  const std::string_view mode = d.take_one({".clamp", ".wrap"});
  if (mode.empty()) refuse_malformed(d, "szext needs .clamp or .wrap");
  const Type type = d.need_type();
  d.dest(type);
  d.source(type);
  d.source(Type::kU32);
  using W = uint32_t;
  const bool clamp = mode == ".clamp";
  if (type == Type::kS32) {
    d.handler(clamp ? elementwise<Extend<true, true>, W, W, W>
                    : elementwise<Extend<false, true>, W, W, W>,
              InstrClass::kInteger);
  } else if (type == Type::kU32) {
    d.handler(clamp ? elementwise<Extend<true, false>, W, W, W>
                    : elementwise<Extend<false, false>, W, W, W>,
              InstrClass::kInteger);
  } else {
    refuse_malformed(d, "szext is of .u32 or .s32");
  }
}

constexpr Opcode kOpcodes[] = {
    {"and", decode_logic<And, BoolOp::kAnd>},
    {"or", decode_logic<Or, BoolOp::kOr>},
    {"xor", decode_logic<Xor, BoolOp::kXor>},
    {"not", decode_not},
    {"cnot", decode_cnot},
    {"shl", decode_shl},
    {"shr", decode_shr},
    {"shf", decode_shf},
    {"bfe", decode_bfe},
    {"bfi", decode_bfi},
    {"bfind", decode_bfind},
    {"popc", decode_count<Popcount>},
    {"clz", decode_count<LeadingZeros>},
    {"brev", decode_brev},
    {"fns", decode_fns},
    {"bmsk", decode_bmsk},
    {"szext", decode_szext},
};

}  // namespace

const OpcodeFamily kBitsFamily = {"bits", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
