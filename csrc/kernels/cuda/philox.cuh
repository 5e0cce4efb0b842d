// The dropout mask of csrc/kernels/cpu/philox_impl.h, bit for bit: Philox4x32-10 (Salmon et al., SC
// 2011), element e takes word e % 4 of counter e / 4 under the seed as key and is kept when the
// word is not below the threshold.
#pragma once

#include <cstdint>

namespace fused_peft::cuda {

__device__ inline uint4 philox4x32(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = __umulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = __umulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

struct Dropout {
  const uint64_t* seed = nullptr;  // device memory, one value; null without dropout
  uint32_t threshold = 0;
};

// Four bits: which elements of a counter are kept.
__device__ inline uint32_t keep_counter(uint64_t seed, uint32_t threshold, uint64_t counter) {
  const uint4 words = philox4x32(seed, counter);
  return uint32_t{words.x >= threshold} | uint32_t{words.y >= threshold} << 1 |
         uint32_t{words.z >= threshold} << 2 | uint32_t{words.w >= threshold} << 3;
}

// Bit i: whether element first + i is kept, for i < Count, at most 32.
template <int Count>
__device__ inline uint32_t keep_bits(uint64_t seed, uint32_t threshold, uint64_t first) {
  static_assert(Count <= 32);
  const int shift = static_cast<int>(first & 3);
  uint64_t bits = 0;
#pragma unroll 1
  for (int i = 0; 4 * i < Count + shift; ++i) {
    bits |= uint64_t{keep_counter(seed, threshold, (first >> 2) + static_cast<uint64_t>(i))}
            << (4 * i);
  }
  return static_cast<uint32_t>(bits >> shift);
}

// The same where first is a multiple of four: the counters do not depend on one another.
template <int Count>
__device__ inline uint32_t keep_bits_whole(uint64_t seed, uint32_t threshold, uint64_t first) {
  static_assert(Count % 4 == 0 && Count <= 32);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < Count / 4; ++i)
    bits |= keep_counter(seed, threshold, first / 4 + static_cast<uint64_t>(i)) << (4 * i);
  return bits;
}

}  // namespace fused_peft::cuda
