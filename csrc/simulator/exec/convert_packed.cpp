// Conversions of two values into one register and back: f16x2, bf16x2, e4m3x2, e5m2x2, and
// cvt.pack.
#include <array>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/convert.h"
#include "simulator/exec/half.h"

namespace fused_peft::sim {
namespace {

// The first source becomes the upper half.
template <class Format, class Packed>
Step pack_floats(Warp& warp, const Instr& instr, LaneMask mask) {
  const Conversion what = Conversion::unpack(instr.variant);
  const auto* high = lanes_of<float>(warp, instr.source(0));
  const auto* low = lanes_of<float>(warp, instr.source(1));
  alignas(64) Packed out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Packed upper = convert_to<Format>(high[lane], what.rounding, what.relu, what.satfinite);
    const Packed lower = convert_to<Format>(low[lane], what.rounding, what.relu, what.satfinite);
    out[lane] = Packed(upper << Format::kBits | lower);
  }
  store_lanes(dest_lanes<Packed>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

template <class Lanes>
Step pack_nearest(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) uint16_t high[kLanes], low[kLanes];
  Lanes::to(lanes_of<float>(warp, instr.source(0)), high, kLanes);
  Lanes::to(lanes_of<float>(warp, instr.source(1)), low, kLanes);
  alignas(64) uint32_t out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = uint32_t{high[lane]} << 16 | low[lane];
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

// f16x2 -> e4m3x2, e5m2x2
template <class Format>
Step halves_to_bytes(Warp& warp, const Instr& instr, LaneMask mask) {
  const Conversion what = Conversion::unpack(instr.variant);
  alignas(64) float values[2 * kLanes];
  F16Lanes::from(lanes_of<uint16_t>(warp, instr.source(0)), values, 2 * kLanes);
  alignas(64) uint16_t out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const unsigned low =
        convert_to<Format>(values[2 * lane], what.rounding, what.relu, what.satfinite);
    const unsigned high =
        convert_to<Format>(values[2 * lane + 1], what.rounding, what.relu, what.satfinite);
    out[lane] = uint16_t(high << 8 | low);
  }
  store_lanes(dest_lanes<uint16_t>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

// f16 holds every value of both 8-bit formats.
template <class Format>
const std::array<uint16_t, 256>& halves_of() {
  static const std::array<uint16_t, 256> table = [] {
    std::array<uint16_t, 256> halves{};
    for (unsigned i = 0; i < 256; ++i) {
      halves[i] = encode<F16Format>(decode<Format>(i), Rounding::kNearestEven);
    }
    return halves;
  }();
  return table;
}

template <class Format>
Step bytes_to_halves(Warp& warp, const Instr& instr, LaneMask mask) {
  const bool relu = Conversion::unpack(instr.variant).relu;
  const auto* source = lanes_of<uint16_t>(warp, instr.source(0));
  const auto& table = halves_of<Format>();
  alignas(64) uint32_t out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t low = table[source[lane] & 0xff], high = table[source[lane] >> 8];
    if (relu && low >= 0x8000) low = 0;
    if (relu && high >= 0x8000) high = 0;
    out[lane] = high << 16 | low;
  }
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

bool is_byte_pair(Type type) { return type == Type::kE4M3x2 || type == Type::kE5M2x2; }

Handler two_floats_handler(const Conversion& what) {
  const bool plain = what.rounding == Rounding::kNearestEven && !what.relu && !what.satfinite;
  switch (what.dest) {
    case Type::kF16x2: return plain ? pack_nearest<F16Lanes> : pack_floats<F16Format, uint32_t>;
    case Type::kBF16x2: return plain ? pack_nearest<BF16Lanes> : pack_floats<BF16Format, uint32_t>;
    case Type::kE4M3x2: return pack_floats<E4M3Format, uint16_t>;
    default: return pack_floats<E5M2Format, uint16_t>;
  }
}

// cvt.pack.sat: what a destination of 2, 4, 8 or 16 bits holds of each of two s32.
template <class T>
T clamp(T value, T least, T most) {
  return value < least ? least : value > most ? most : value;
}

// imm: bits of one element; variant: 1 where it is signed.
Step pack_saturated(Warp& warp, const Instr& instr, LaneMask mask) {
  const auto* a = lanes_of<int32_t>(warp, instr.source(0));
  const auto* b = lanes_of<int32_t>(warp, instr.source(1));
  const uint32_t* c = instr.num_sources > 2 ? lanes_of<uint32_t>(warp, instr.source(2)) : nullptr;
  const auto bits = unsigned(instr.imm);
  const int32_t most = instr.variant ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  const int32_t least = instr.variant ? -(1 << (bits - 1)) : 0;
  const uint32_t element = (1u << bits) - 1;
  alignas(64) uint32_t out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t high = uint32_t(clamp(a[lane], least, most)) & element;
    const uint32_t low = uint32_t(clamp(b[lane], least, most)) & element;
    out[lane] = high << bits | low;
    if (c) out[lane] |= c[lane] << (2 * bits);
  }
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

}  // namespace

bool decode_packed_conversion(Decoding& d, const Conversion& what) {
  Handler handler = nullptr;
  const bool to_bytes = is_byte_pair(what.dest);
  const bool to_halves = what.dest == Type::kF16x2 || what.dest == Type::kBF16x2;
  if (!to_bytes && !to_halves) {
    if (is_byte_pair(what.source)) refuse(d, "this packed conversion");
    return false;
  }
  if (what.to_integer || what.sat || what.ftz)
    refuse_malformed(d, "a qualifier that packed conversions have not");
  if (to_bytes && !(what.satfinite && what.rounding == Rounding::kNearestEven)) {
    refuse_malformed(d, "conversion to 8-bit floats needs .rn.satfinite");
  }
  d.dest(what.dest);
  if (what.source == Type::kF32) {
    d.source(Type::kF32);
    d.source(Type::kF32);
    handler = two_floats_handler(what);
  } else if (what.source == Type::kF16x2 && to_bytes) {
    d.source(Type::kF16x2);
    handler =
        what.dest == Type::kE4M3x2 ? halves_to_bytes<E4M3Format> : halves_to_bytes<E5M2Format>;
  } else if (what.dest == Type::kF16x2 && is_byte_pair(what.source)) {
    d.source(what.source);
    handler =
        what.source == Type::kE4M3x2 ? bytes_to_halves<E4M3Format> : bytes_to_halves<E5M2Format>;
  } else {
    refuse(d, "this packed conversion");
  }
  d.handler(handler, InstrClass::kConvert);
  d.instr().variant = what.pack();
  return true;
}

void decode_pack_conversion(Decoding& d) {
  if (!d.take(".sat")) refuse_malformed(d, "cvt.pack needs .sat");
  constexpr struct {
    const char* name;
    int bits;
    bool has_sign;
  } kElements[] = {{".s16", 16, true}, {".u16", 16, false}, {".s8", 8, true}, {".u8", 8, false},
                   {".s4", 4, true},   {".u4", 4, false},   {".s2", 2, true}, {".u2", 2, false}};
  for (const auto& element : kElements) {
    if (!d.take(element.name)) continue;
    if (!d.take(".s32")) refuse_malformed(d, "cvt.pack converts from .s32");
    const bool merge = d.take(".b32");
    if (merge != (element.bits < 16))
      refuse_malformed(d, "cvt.pack below 16 bits, and only it, merges with .b32");
    d.dest(Type::kB32);
    d.source(Type::kS32);
    d.source(Type::kS32);
    if (merge) d.source(Type::kB32);
    d.handler(pack_saturated, InstrClass::kConvert);
    d.instr().imm = element.bits;
    d.instr().variant = element.has_sign;
    return;
  }
  refuse_malformed(d, "cvt.pack needs the type of its elements");
}

}  // namespace fused_peft::sim
