// The conversions that compilers emit most, over whole warps.
#include <type_traits>

#include "simulator/core/lanes.h"
#include "simulator/exec/convert.h"
#include "simulator/exec/half.h"

namespace fused_peft::sim {
namespace {

template <class D, class S>
struct Cast {
  D operator()(S value) const { return static_cast<D>(value); }
};

template <class S>
Handler from_integer(int dest_bytes) {
  switch (dest_bytes) {
    case 2: return elementwise<Cast<uint16_t, S>, uint16_t, S>;
    case 4: return elementwise<Cast<uint32_t, S>, uint32_t, S>;
    case 8: return elementwise<Cast<uint64_t, S>, uint64_t, S>;
    default: return nullptr;
  }
}

Handler integer_to_integer(const Conversion& what) {
  if (what.sat) return nullptr;
  const int bytes = bytes_of(what.dest);
  switch (what.source) {
    case Type::kU16: return from_integer<uint16_t>(bytes);
    case Type::kS16: return from_integer<int16_t>(bytes);
    case Type::kU32: return from_integer<uint32_t>(bytes);
    case Type::kS32: return from_integer<int32_t>(bytes);
    case Type::kU64:
    case Type::kS64: return from_integer<uint64_t>(bytes);
    default: return nullptr;
  }
}

template <Rounding kRounding>
float round_float(float value) {
  if (kRounding == Rounding::kZero) return std::trunc(value);
  if (kRounding == Rounding::kDown) return std::floor(value);
  if (kRounding == Rounding::kUp) return std::ceil(value);
  return std::nearbyint(value);
}

// Clamped, NaN to zero: without branches, and without a conversion that C++ leaves undefined.
template <Rounding kRounding>
struct FloatToS32 {
  int32_t operator()(float value) const {
    const float rounded = round_float<kRounding>(value);
    constexpr float kLeast = -2147483648.0f, kMost = 2147483520.0f;  // the largest float below 2^31
    float clamped = rounded > kLeast ? rounded : kLeast;
    clamped = clamped < kMost ? clamped : kMost;
    const int32_t converted = static_cast<int32_t>(clamped);
    const int32_t result = rounded > kMost ? INT32_MAX : converted;
    return value != value ? 0 : result;
  }
};

template <Rounding kRounding>
struct RoundFloat {
  float operator()(float value) const { return canonical(round_float<kRounding>(value)); }
};

// kHandler<rounding> of the mode.
template <template <Rounding> class Op, class D>
Handler with_rounding(Rounding rounding) {
  switch (rounding) {
    case Rounding::kNearestEven: return elementwise<Op<Rounding::kNearestEven>, D, float>;
    case Rounding::kZero: return elementwise<Op<Rounding::kZero>, D, float>;
    case Rounding::kDown: return elementwise<Op<Rounding::kDown>, D, float>;
    case Rounding::kUp: return elementwise<Op<Rounding::kUp>, D, float>;
    default: return nullptr;
  }
}

template <class Lanes>
Step to_half(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) uint16_t out[kLanes];
  Lanes::to(lanes_of<float>(warp, instr.source(0)), out, kLanes);
  store_lanes(dest_lanes<uint16_t>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

template <class Lanes>
Step from_half(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) float out[kLanes];
  Lanes::from(lanes_of<uint16_t>(warp, instr.source(0)), out, kLanes);
  for (float& value : out) value = canonical(value);
  store_lanes(dest_lanes<float>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

struct Narrow {
  float operator()(double value) const { return canonical(static_cast<float>(value)); }
};

Handler to_f32(const Conversion& what, bool nearest) {
  switch (what.source) {
    case Type::kF16: return from_half<F16Lanes>;
    case Type::kBF16: return from_half<BF16Lanes>;
    case Type::kF32:
      return what.to_integer ? with_rounding<RoundFloat, float>(what.rounding) : nullptr;
    case Type::kF64: return nearest ? elementwise<Narrow, float, double> : nullptr;
    case Type::kS32: return nearest ? elementwise<Cast<float, int32_t>, float, int32_t> : nullptr;
    case Type::kU32: return nearest ? elementwise<Cast<float, uint32_t>, float, uint32_t> : nullptr;
    default: return nullptr;
  }
}

}  // namespace

Handler fast_conversion(const Conversion& what) {
  if (what.ftz || what.relu || what.satfinite) return nullptr;
  if (!is_float(what.dest) && !is_float(what.source)) return integer_to_integer(what);
  if (what.sat && is_float(what.dest)) return nullptr;
  const bool nearest = what.rounding == Rounding::kNearestEven && !what.to_integer;
  if (what.dest == Type::kS32 && what.source == Type::kF32) {
    return with_rounding<FloatToS32, int32_t>(what.rounding);
  }
  if (what.dest == Type::kF32) return to_f32(what, nearest);
  if (what.source == Type::kF32 && nearest) {
    if (what.dest == Type::kF16) return to_half<F16Lanes>;
    if (what.dest == Type::kBF16) return to_half<BF16Lanes>;
    if (what.dest == Type::kF64) return elementwise<Cast<double, float>, double, float>;
  }
  if (what.dest == Type::kF64 && what.source == Type::kS32) {
    return elementwise<Cast<double, int32_t>, double, int32_t>;  // exact
  }
  return nullptr;
}

}  // namespace fused_peft::sim
