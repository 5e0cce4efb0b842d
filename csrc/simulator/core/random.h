// The generator behind a launch's schedule.
#pragma once

#include <cstdint>

namespace fused_peft::sim {

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // From 0 to n - 1.
  uint32_t below(uint32_t n) { return uint32_t(((next() >> 32) * n) >> 32); }
  // From 1 to about 2^max_log2, all magnitudes equally often.
  uint32_t length(uint32_t max_log2) {
    const uint32_t exponent = below(max_log2 + 1);
    return (1u << exponent) + below(1u << exponent);
  }

 private:
  uint64_t state_;
};

}  // namespace fused_peft::sim
