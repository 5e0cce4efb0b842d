// Sums of byte and half-word products, and small multiplications: dp4a dp2a sad mul24 mad24.
#include <iterator>
#include <type_traits>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/numeric.h"

namespace fused_peft::sim {
namespace {

template <bool kSigned>
int32_t byte_of(uint32_t word, unsigned i) {
  const auto byte = uint8_t(word >> (8 * i));
  return kSigned ? int32_t{int8_t(byte)} : int32_t{byte};
}
template <bool kSigned>
int32_t half_of(uint32_t word, unsigned i) {
  const auto half = uint16_t(word >> (16 * i));
  return kSigned ? int32_t{int16_t(half)} : int32_t{half};
}

template <bool kSignedA, bool kSignedB>
struct Dot4 {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    for (unsigned i = 0; i < 4; ++i)
      c += uint32_t(byte_of<kSignedA>(a, i) * byte_of<kSignedB>(b, i));
    return c;
  }
};

template <bool kSignedA, bool kSignedB, bool kHigh>
struct Dot2 {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    for (unsigned i = 0; i < 2; ++i) {
      c += uint32_t(half_of<kSignedA>(a, i) * byte_of<kSignedB>(b, i + (kHigh ? 2 : 0)));
    }
    return c;
  }
};

using W = uint32_t;
template <bool kA, bool kB>
Handler dot_handler(bool two, bool high) {
  if (!two) return elementwise<Dot4<kA, kB>, W, W, W, W>;
  return high ? elementwise<Dot2<kA, kB, true>, W, W, W, W>
              : elementwise<Dot2<kA, kB, false>, W, W, W, W>;
}

void decode_dot(Decoding& d) {
  const bool two = d.opcode() == "dp2a";
  bool high = false;
  if (two) {
    const std::string_view part = d.take_one({".lo", ".hi"});
    if (part.empty()) refuse_malformed(d, "dp2a needs .lo or .hi");
    high = part == ".hi";
  }
  const Type a = d.need_type(), b = d.need_type();
  if (bytes_of(a) != 4 || bytes_of(b) != 4 || is_float(a) || is_float(b)) {
    refuse_malformed(d, "the types are .u32 or .s32");
  }
  take_operands(d, Type::kB32, 3);
  Handler handler;
  if (is_signed(a)) {
    handler =
        is_signed(b) ? dot_handler<true, true>(two, high) : dot_handler<true, false>(two, high);
  } else {
    handler =
        is_signed(b) ? dot_handler<false, true>(two, high) : dot_handler<false, false>(two, high);
  }
  d.handler(handler, InstrClass::kInteger);
}

template <class T>
struct AbsoluteDifference {
  T operator()(T a, T b, T c) const {
    using Wide = std::conditional_t<sizeof(T) == 2, uint32_t, std::make_unsigned_t<T>>;
    const Wide difference = a < b ? Wide(b) - Wide(a) : Wide(a) - Wide(b);
    return T(Wide(c) + difference);
  }
};

void decode_sad(Decoding& d) {
  const Type type = d.need_type();
  take_operands(d, type, 3);
  const bool has_sign = is_signed(type);
  d.handler(with_width(d, type,
                       [has_sign]<class T>(T) -> Handler {
                         using S = std::make_signed_t<T>;
                         return has_sign ? elementwise<AbsoluteDifference<S>, S, S, S, S>
                                         : elementwise<AbsoluteDifference<T>, T, T, T, T>;
                       }),
            InstrClass::kInteger);
}

// The product of the low 24 bits, 48 bits of it.
template <bool kSigned>
int64_t product24(uint32_t a, uint32_t b) {
  if (kSigned) return int64_t{int32_t(a << 8) >> 8} * (int32_t(b << 8) >> 8);
  return int64_t(uint64_t{a & 0xffffff} * (b & 0xffffff));
}

template <bool kSigned, bool kHigh>
struct Mul24 {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    return uint32_t(product24<kSigned>(a, b) >> (kHigh ? 16 : 0));
  }
};
template <bool kSigned, bool kHigh>
struct Mad24 {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    return Mul24<kSigned, kHigh>()(a, b) + c;
  }
};
struct Mad24HighSaturating {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const int64_t sum = int64_t{int32_t(Mul24<true, true>()(a, b))} + int32_t(c);
    return uint32_t(clamp_to_s32(sum));
  }
};

template <bool kSigned, bool kHigh>
Handler handler24(bool add) {
  return add ? elementwise<Mad24<kSigned, kHigh>, W, W, W, W>
             : elementwise<Mul24<kSigned, kHigh>, W, W, W>;
}

void decode_24(Decoding& d) {
  const bool add = d.opcode() == "mad24";
  const std::string_view part = d.take_one({".lo", ".hi"});
  if (part.empty()) refuse_malformed(d, "24-bit multiplication needs .lo or .hi");
  const bool sat = d.take(".sat"), high = part == ".hi";
  const Type type = d.need_type();
  if (type != Type::kU32 && type != Type::kS32) refuse_malformed(d, "the type is .u32 or .s32");
  if (sat && !(add && high && type == Type::kS32)) refuse_malformed(d, ".sat is for mad24.hi.s32");
  take_operands(d, type, add ? 3 : 2);
  Handler handler;
  if (sat) {
    handler = elementwise<Mad24HighSaturating, W, W, W, W>;
  } else if (type == Type::kS32) {
    handler = high ? handler24<true, true>(add) : handler24<true, false>(add);
  } else {
    handler = high ? handler24<false, true>(add) : handler24<false, false>(add);
  }
  d.handler(handler, InstrClass::kInteger);
}

constexpr Opcode kOpcodes[] = {{"dp4a", decode_dot},
                               {"dp2a", decode_dot},
                               {"sad", decode_sad},
                               {"mul24", decode_24},
                               {"mad24", decode_24}};

}  // namespace

const OpcodeFamily kDotFamily = {"dot", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
