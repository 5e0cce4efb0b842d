// Floating-point formats narrower than double, as bits: decoding, and encoding in every rounding
// mode. Saturation.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace fused_peft::sim {

enum class Rounding : uint8_t {
  kNearestEven,
  kZero,
  kDown,
  kUp,
  kNearestAway,
};

// A format's layout. kMaxFinite, kInfinity and kNan are magnitudes; kInfinity == kNan where the
// format has no infinity. kNan is the one that instructions write.
struct F64Format {
  using Bits = uint64_t;
  static constexpr int kBits = 64, kMantissa = 52, kBias = 1023;
  static constexpr Bits kMaxFinite = 0x7fefffffffffffffu, kInfinity = 0x7ff0000000000000u,
                        kNan = 0x7ff8000000000000u;
};
struct F32Format {
  using Bits = uint32_t;
  static constexpr int kBits = 32, kMantissa = 23, kBias = 127;
  static constexpr Bits kMaxFinite = 0x7f7fffff, kInfinity = 0x7f800000, kNan = 0x7fffffff;
};
// TF32 without the 13 low bits of the register that holds it.
struct TF32Format {
  using Bits = uint32_t;
  static constexpr int kBits = 19, kMantissa = 10, kBias = 127;
  static constexpr Bits kMaxFinite = 0x3fbff, kInfinity = 0x3fc00, kNan = 0x3ffff;
};
struct F16Format {
  using Bits = uint16_t;
  static constexpr int kBits = 16, kMantissa = 10, kBias = 15;
  static constexpr Bits kMaxFinite = 0x7bff, kInfinity = 0x7c00, kNan = 0x7fff;
};
struct BF16Format {
  using Bits = uint16_t;
  static constexpr int kBits = 16, kMantissa = 7, kBias = 127;
  static constexpr Bits kMaxFinite = 0x7f7f, kInfinity = 0x7f80, kNan = 0x7fff;
};
struct E4M3Format {
  using Bits = uint8_t;
  static constexpr int kBits = 8, kMantissa = 3, kBias = 7;
  static constexpr Bits kMaxFinite = 0x7e, kInfinity = 0x7f, kNan = 0x7f;
};
struct E5M2Format {
  using Bits = uint8_t;
  static constexpr int kBits = 8, kMantissa = 2, kBias = 15;
  static constexpr Bits kMaxFinite = 0x7b, kInfinity = 0x7c, kNan = 0x7f;
};

// Whether a magnitude between two neighbours goes to the upper: `remainder` of `half * 2` is above
// the lower, whose last bit is `odd`.
constexpr bool rounds_up(Rounding rounding, bool negative, bool odd, uint64_t remainder,
                         uint64_t half) {
  switch (rounding) {
    case Rounding::kNearestEven: return remainder > half || (remainder == half && odd);
    case Rounding::kNearestAway: return remainder >= half;
    case Rounding::kZero: return false;
    case Rounding::kDown: return negative && remainder != 0;
    case Rounding::kUp: return !negative && remainder != 0;
  }
  return false;
}

// (-1)^negative * significand * 2^exponent in Format. Overflow gives the largest finite value where
// the mode rounds toward it or `saturate` is set, infinity (NaN in a format without one) elsewhere.
template <class Format>
constexpr typename Format::Bits encode(bool negative, uint64_t significand, int exponent,
                                       Rounding rounding, bool saturate = false) {
  const uint64_t sign = uint64_t{negative} << (Format::kBits - 1);
  if (significand == 0) return static_cast<typename Format::Bits>(sign);
  const int shift = std::countl_zero(significand);
  significand <<= shift;
  const int leading = exponent - shift + 63;  // weight of the first bit
  constexpr int kMinExponent = 1 - Format::kBias;
  const int exponent_field = leading > kMinExponent ? leading : kMinExponent;
  const int drop = exponent_field - Format::kMantissa - (leading - 63);
  uint64_t kept = 0, remainder = 1,
           half = 2;  // what is far below the last place: neither zero nor half
  if (drop == 64) {
    remainder = significand, half = uint64_t{1} << 63;
  } else if (drop < 64) {
    kept = significand >> drop;
    remainder = significand & ((uint64_t{1} << drop) - 1);
    half = drop == 0 ? 1 : uint64_t{1} << (drop - 1);
  }
  if (rounds_up(rounding, negative, kept & 1, remainder, half)) ++kept;
  // The implicit bit of a normal number adds one to the exponent field, and so does a carry out of
  // the mantissa.
  uint64_t bits = kept + (uint64_t(exponent_field + Format::kBias - 1) << Format::kMantissa);
  if (exponent_field > Format::kBias + 1 || bits > Format::kMaxFinite) {
    const bool to_finite = saturate || rounding == Rounding::kZero ||
                           (rounding == Rounding::kDown && !negative) ||
                           (rounding == Rounding::kUp && negative);
    bits = to_finite ? Format::kMaxFinite : Format::kInfinity;
  }
  return static_cast<typename Format::Bits>(sign | bits);
}

template <class Format>
inline typename Format::Bits encode(double value, Rounding rounding, bool saturate = false) {
  const auto bits = std::bit_cast<uint64_t>(value);
  const bool negative = bits >> 63;
  const int field = int(bits >> 52 & 0x7ff);
  uint64_t significand = bits & ((uint64_t{1} << 52) - 1);
  if (field == 0x7ff) {
    if (significand != 0) return Format::kNan;
    const uint64_t magnitude = saturate ? Format::kMaxFinite : Format::kInfinity;
    return static_cast<typename Format::Bits>(uint64_t{negative} << (Format::kBits - 1) |
                                              magnitude);
  }
  if (field != 0) significand |= uint64_t{1} << 52;
  return encode<Format>(negative, significand, (field == 0 ? 1 : field) - 1075, rounding, saturate);
}

template <class Format>
constexpr bool is_nan_bits(uint64_t bits) {
  const uint64_t magnitude = bits & ((uint64_t{1} << (Format::kBits - 1)) - 1);
  return Format::kInfinity == Format::kNan ? magnitude == Format::kNan
                                           : magnitude > Format::kInfinity;
}

template <class Format>
inline double decode(uint64_t bits) {
  const bool negative = bits >> (Format::kBits - 1) & 1;
  const uint64_t magnitude = bits & ((uint64_t{1} << (Format::kBits - 1)) - 1);
  double value;
  if (is_nan_bits<Format>(bits)) {
    value = std::bit_cast<double>(F64Format::kNan);
  } else if (magnitude == Format::kInfinity) {
    value = std::bit_cast<double>(F64Format::kInfinity);
  } else {
    const int field = int(magnitude >> Format::kMantissa);
    uint64_t significand = magnitude & ((uint64_t{1} << Format::kMantissa) - 1);
    if (field != 0) significand |= uint64_t{1} << Format::kMantissa;
    value = std::ldexp(double(significand),
                       (field == 0 ? 1 : field) - Format::kBias - Format::kMantissa);
  }
  return negative ? -value : value;
}

// ---- float, lane by lane: written without branches so that loops over lanes vectorise

inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

// NaN results of single-precision instructions are all this one.
inline float canonical(float value) { return value != value ? float_of(F32Format::kNan) : value; }
// A subnormal as the zero of its sign.
inline float flush(float value) {
  const uint32_t bits = bits_of(value);
  return float_of((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}
// .sat: clamped to [0, 1], NaN to +0.
inline float saturate(float value) { return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f; }
inline double saturate(double value) { return value > 0.0 ? (value < 1.0 ? value : 1.0) : 0.0; }

constexpr int32_t clamp_to_s32(int64_t value) {
  return int32_t(value > INT32_MAX ? INT32_MAX : value < INT32_MIN ? INT32_MIN : value);
}

// The float with an odd last bit next to an inexact value (round to odd): rounding it once more, to
// at most 22 bits, gives what rounding the value itself would have given.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = nearest;
  uint32_t bits = bits_of(nearest);
  bits -= std::abs(back) > std::abs(value) ? 1 : 0;
  bits |= back != value && value == value ? 1 : 0;
  return float_of(bits);
}

inline float float_of_bf16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }
// To nearest even; NaN to 0x7fff.
inline uint16_t bf16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? BF16Format::kNan : rounded);
}

}  // namespace fused_peft::sim
