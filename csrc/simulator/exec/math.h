// Elementary functions of one lane, as the special function unit's approximations have to be, or
// better: computed in double precision, without branches (loops over lanes vectorise), and rounded
// once to single precision.
#pragma once

#include "simulator/exec/numeric.h"

namespace fused_peft::sim {

// 2^x for -1000 < x < 1000, to a relative 2^-31.
inline double exp2_of(double x) {
  constexpr double kShift = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double shifted = x + kShift;
  const double f = x - (shifted - kShift);
  // Taylor: (ln 2)^k / k!
  double p = 1.3215486790144307e-06;
  p = p * f + 1.525273380405984e-05;
  p = p * f + 1.5403530393381608e-04;
  p = p * f + 1.3333558146428443e-03;
  p = p * f + 9.618129107628477e-03;
  p = p * f + 5.550410866482158e-02;
  p = p * f + 2.402265069591007e-01;
  p = p * f + 6.931471805599453e-01;
  p = p * f + 1.0;
  const uint64_t exponent = std::bit_cast<uint64_t>(shifted) << 52;
  return std::bit_cast<double>(std::bit_cast<uint64_t>(p) + exponent);
}

inline float exp2_approx(float x) {
  float clamped = x < 160.0f ? x : 160.0f;
  clamped = clamped > -160.0f ? clamped : -160.0f;
  return x != x ? float_of(F32Format::kNan) : static_cast<float>(exp2_of(clamped));
}

// log2, to a relative 2^-40 or so: m * 2^e with m around 1, log2 m by the series of 2 atanh((m - 1)
// / (m + 1)).
inline float log2_approx(float x) {
  const auto bits = std::bit_cast<uint64_t>(double{x});
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000;
  constexpr uint64_t kMantissa = (uint64_t{1} << 52) - 1, kMagic = 0x4330000000000000;  // 2^52
  const uint64_t offset = bits + (kOne - kRootHalf);
  const double exponent = std::bit_cast<double>(kMagic | offset >> 52) - (0x1p52 + 1023);
  const double m = std::bit_cast<double>((offset & kMantissa) + kRootHalf);
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double p = 1.0 / 13;
  p = p * s2 + 1.0 / 11;
  p = p * s2 + 1.0 / 9;
  p = p * s2 + 1.0 / 7;
  p = p * s2 + 1.0 / 5;
  p = p * s2 + 1.0 / 3;
  p = p * s2 + 1.0;
  constexpr double kTwoOverLn2 = 2.885390081777927;
  float result = static_cast<float>(exponent + kTwoOverLn2 * s * p);
  constexpr float kInfinity = __builtin_inff();
  result = x == kInfinity ? kInfinity : result;
  result = x == 0.0f ? -kInfinity : result;
  return x >= 0.0f ? result : float_of(F32Format::kNan);
}

// Arguments that the reduction below is good for.
constexpr float kMaxReduced = 1e6f;

// sin (quarter 0) or cos (quarter 1): the argument is reduced to [-pi/4, pi/4] around a multiple of
// pi/2.
inline float sine_approx(float x, uint64_t quarter) {
  constexpr double kShift = 0x1.8p52, kTwoOverPi = 0.6366197723675814;
  constexpr double kHalfPi = 1.5707963267948966, kHalfPiLow = 6.123233995736766e-17;
  const double shifted = double{x} * kTwoOverPi + kShift;
  const double k = shifted - kShift;
  const double r = (x - k * kHalfPi) - k * kHalfPiLow, r2 = r * r;
  double s = 1.605904383682161e-10;
  s = s * r2 - 2.505210838544172e-08;
  s = s * r2 + 2.755731922398589e-06;
  s = s * r2 - 1.984126984126984e-04;
  s = s * r2 + 8.333333333333333e-03;
  s = s * r2 - 1.6666666666666666e-01;
  s = (s * r2 + 1.0) * r;  // keeps the sign of a zero
  double c = 2.08767569878681e-09;
  c = c * r2 - 2.755731922398589e-07;
  c = c * r2 + 2.48015873015873e-05;
  c = c * r2 - 1.388888888888889e-03;
  c = c * r2 + 4.1666666666666664e-02;
  c = c * r2 - 0.5;
  c = c * r2 + 1.0;
  const uint64_t quadrant = std::bit_cast<uint64_t>(shifted) + quarter;
  const double value = (quadrant & 1) ? c : s;
  const auto result = static_cast<float>((quadrant & 2) ? -value : value);
  return x - x == 0.0f ? result : float_of(F32Format::kNan);  // infinities have no sine
}

inline float tanh_approx(float x) {
  const double magnitude = std::abs(double{x});
  constexpr double kMinusTwoLog2E = -2.8853900817779268;
  const double clamped = magnitude < 30.0 ? magnitude : 30.0;
  const double t = exp2_of(kMinusTwoLog2E * clamped);
  const double x2 = clamped * clamped;
  const double small = clamped * (1.0 - x2 * (1.0 / 3 - x2 * (2.0 / 15)));
  const double value = clamped < 0.02 ? small : (1.0 - t) / (1.0 + t);
  const float result = float_of(bits_of(static_cast<float>(value)) | (bits_of(x) & 0x80000000));
  return x != x ? float_of(F32Format::kNan) : result;
}

}  // namespace fused_peft::sim
