// cvt: between all integer and floating-point types, in every rounding mode.
#include "simulator/exec/convert.h"

#include <iterator>
#include <limits>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

// A lane on its way: integers as sign and magnitude, floats as the double that they are exactly.
struct Lane {
  bool negative = false;
  uint64_t magnitude = 0;
  double value = 0;
};

int bits_in(Type type) { return 8 * bytes_of(type); }

uint64_t low_bits(uint64_t word, int bits) {
  return bits == 64 ? word : word & ((uint64_t{1} << bits) - 1);
}

uint64_t sign_extend(uint64_t word, int bits) {
  return uint64_t(int64_t(word << (64 - bits)) >> (64 - bits));
}

Lane load_integer(uint64_t word, Type type) {
  const int bits = bits_in(type);
  if (!is_signed(type)) return {false, low_bits(word, bits), 0};
  const auto value = int64_t(sign_extend(word, bits));
  return {value < 0, value < 0 ? 0 - uint64_t(value) : uint64_t(value), 0};
}

double load_float(uint64_t word, Type type) {
  switch (type) {
    case Type::kF16: return decode<F16Format>(word & 0xffff);
    case Type::kBF16: return decode<BF16Format>(word & 0xffff);
    case Type::kF32: return float_of(uint32_t(word));
    default: return std::bit_cast<double>(word);
  }
}

// f(F()) with the format of a floating-point type.
template <class Fn>
uint64_t with_format(Type type, Fn fn) {
  switch (type) {
    case Type::kF16: return fn(F16Format{});
    case Type::kBF16: return fn(BF16Format{});
    case Type::kTF32: return fn(TF32Format{});
    case Type::kF32: return fn(F32Format{});
    default: return fn(F64Format{});
  }
}

uint64_t integer_to_integer(Lane lane, const Conversion& what) {
  if (!what.sat) return lane.negative ? 0 - lane.magnitude : lane.magnitude;
  const int bits = bits_in(what.dest);
  const bool has_sign = is_signed(what.dest);
  const uint64_t most = low_bits(~uint64_t{0}, bits) >> (has_sign ? 1 : 0);
  if (!lane.negative) return lane.magnitude < most ? lane.magnitude : most;
  const uint64_t least = has_sign ? uint64_t{1} << (bits - 1) : 0;
  return 0 - (lane.magnitude < least ? lane.magnitude : least);
}

// Clamped to the type's range. NaN is zero between 32-bit types; where 64 bits take part, only the
// highest bit is set.
uint64_t float_to_integer(double value, const Conversion& what) {
  const int bits = bits_in(what.dest);
  if (value != value) {
    return what.source == Type::kF64 || bits == 64 ? uint64_t{1} << (bits - 1) : 0;
  }
  value = round_to_integer(value, what.rounding);
  if (is_signed(what.dest)) {
    const double limit = std::ldexp(1.0, bits - 1);
    if (value >= limit) return (uint64_t{1} << (bits - 1)) - 1;
    return value < -limit ? 0 - (uint64_t{1} << (bits - 1)) : uint64_t(int64_t(value));
  }
  if (value >= std::ldexp(1.0, bits)) return low_bits(~uint64_t{0}, bits);
  return value <= 0 ? 0 : uint64_t(value);
}

uint64_t integer_to_float(Lane lane, const Conversion& what) {
  if (what.sat && (lane.negative || lane.magnitude > 1)) lane = {false, lane.negative ? 0u : 1u, 0};
  return with_format(what.dest, [&]<class Format>(Format) -> uint64_t {
    return encode<Format>(lane.negative, lane.magnitude, 0, what.rounding);
  });
}

uint64_t float_to_float(double value, const Conversion& what) {
  if (value != value && !what.sat) {
    // Widening keeps a NaN's payload.
    if (what.dest == Type::kF64) return std::bit_cast<uint64_t>(value);
    if (what.dest == Type::kTF32) return F32Format::kNan;
  }
  if (what.to_integer) value = round_to_integer(value, what.rounding);
  if (what.sat) value = saturate(value);
  const uint64_t bits = with_format(what.dest, [&]<class Format>(Format) -> uint64_t {
    return convert_to<Format>(value, what.rounding, what.relu, what.satfinite);
  });
  if (what.ftz && what.dest == Type::kF32) return bits_of(flush(float_of(uint32_t(bits))));
  return what.dest == Type::kTF32 ? bits << 13 : bits;
}

uint64_t convert_lane(uint64_t word, const Conversion& what) {
  if (!is_float(what.source)) {
    const Lane lane = load_integer(word, what.source);
    return is_float(what.dest) ? integer_to_float(lane, what) : integer_to_integer(lane, what);
  }
  double value = load_float(word, what.source);
  if (what.ftz && what.source == Type::kF32) value = flush(float_of(uint32_t(word)));
  return is_float(what.dest) ? float_to_float(value, what) : float_to_integer(value, what);
}

uint64_t load_word(const std::byte* lanes, int bytes, int lane) {
  uint64_t word = 0;
  std::memcpy(&word, lanes + bytes * lane, size_t(bytes));
  return word;
}

// Any conversion, one lane after the other. Registers may be wider than the types.
Step convert(Warp& warp, const Instr& instr, LaneMask mask) {
  const Conversion what = Conversion::unpack(instr.variant);
  const Operand& source = instr.source(0);
  const Operand& dest = instr.dest(0);
  const std::byte* in = warp.bases[source.space] + source.offset;
  std::byte* out = warp.bases[0] + dest.offset;
  const int dest_bits = bits_in(what.dest);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    uint64_t word = convert_lane(load_word(in, source.bytes, lane), what);
    word = is_signed(what.dest) ? sign_extend(word, dest_bits) : low_bits(word, dest_bits);
    std::memcpy(out + dest.bytes * lane, &word, dest.bytes);
  }
  return Step::kNext;
}

// Sets the rounding mode; false if the text has none.
bool take_conversion_rounding(Decoding& d, Conversion& what) {
  constexpr const char* kToInteger[] = {".rni", ".rzi", ".rmi", ".rpi"};
  constexpr const char* kToFloat[] = {".rn", ".rz", ".rm", ".rp", ".rna"};
  for (size_t i = 0; i < std::size(kToInteger); ++i) {
    if (!d.take(kToInteger[i])) continue;
    what.rounding = Rounding(i);
    what.to_integer = true;
    return true;
  }
  for (size_t i = 0; i < std::size(kToFloat); ++i) {
    if (!d.take(kToFloat[i])) continue;
    what.rounding = Rounding(i);
    return true;
  }
  return false;
}

void check_conversion(Decoding& d, const Conversion& what, bool has_rounding) {
  const bool from_float = is_float(what.source), to_float = is_float(what.dest);
  if (from_float && !to_float && !what.to_integer) {
    refuse_malformed(d, "float to integer needs .rni, .rzi, .rmi or .rpi");
  }
  const bool narrowing = to_float && (!from_float || bytes_of(what.dest) < bytes_of(what.source));
  if (narrowing && (!has_rounding || what.to_integer)) {
    refuse_malformed(d, "this conversion needs .rn, .rz, .rm or .rp");
  }
  if (what.rounding == Rounding::kNearestAway && what.dest != Type::kTF32) {
    refuse_malformed(d, ".rna is for .tf32");
  }
  if (what.relu && what.dest != Type::kF16 && what.dest != Type::kBF16 &&
      what.dest != Type::kTF32) {
    refuse_malformed(d, ".relu is for .f16, .bf16 and .tf32");
  }
}

void decode_cvt(Decoding& d) {
  if (d.take(".pack")) return decode_pack_conversion(d);
  if (d.has(".rs")) refuse(d, "stochastic rounding (sm_100)");
  Conversion what;
  const bool has_rounding = take_conversion_rounding(d, what);
  what.ftz = d.take(".ftz");
  what.sat = d.take(".sat");
  what.relu = d.take(".relu");
  what.satfinite = d.take(".satfinite");
  what.dest = d.need_type();
  what.source = d.need_type();
  if (decode_packed_conversion(d, what)) return;
  check_conversion(d, what, has_rounding);
  d.dest(what.dest, true);
  d.source(what.source, true);
  d.handler(convert, InstrClass::kConvert);
  d.instr().variant = what.pack();
  const bool as_wide = d.instr().dest(0).bytes == bytes_of(what.dest) &&
                       d.instr().source(0).bytes == bytes_of(what.source);
  if (Handler fast = as_wide ? fast_conversion(what) : nullptr) d.instr().run = fast;
}

constexpr Opcode kOpcodes[] = {{"cvt", decode_cvt}};

}  // namespace

const OpcodeFamily kConvertFamily = {"convert", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
