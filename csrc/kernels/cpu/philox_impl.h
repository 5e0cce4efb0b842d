// Dropout mask bits from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011). Element e of a tensor takes word e % 4 of counter e / 4 under the seed as key; it
// is kept when the word is not below the threshold. The mask depends on nothing else: not on the
// instruction set, the threads or the device.
#include <cstdint>

namespace fused_peft::cpu::FUSED_PEFT_ISA {

constexpr int kCounters = 16;  // 64 elements, one word of mask bits

// Mask bits of elements [64 * block, 64 * block + 64).
inline uint64_t philox_bits(uint64_t seed, uint32_t threshold, uint64_t block) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters] = {}, c3[kCounters] = {};
  for (int i = 0; i < kCounters; ++i) {
    const uint64_t counter = block * kCounters + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(counter);
    c1[i] = static_cast<uint32_t>(counter >> 32);
  }
  auto k0 = static_cast<uint32_t>(seed);
  auto k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53U} * c0[i];
      const uint64_t p1 = uint64_t{0xCD9E8D57U} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  uint64_t bits = 0;
  for (int i = 0; i < kCounters; ++i) {
    const uint64_t nibble = uint64_t{c0[i] >= threshold} | uint64_t{c1[i] >= threshold} << 1 |
                            uint64_t{c2[i] >= threshold} << 2 | uint64_t{c3[i] >= threshold} << 3;
    bits |= nibble << (4 * i);
  }
  return bits;
}

// bits[j / 64] bit j % 64: whether element first_element + j is kept.
inline void dropout_row(uint64_t seed, uint32_t threshold, uint64_t first_element, int64_t columns,
                        uint64_t* bits) {
  const uint64_t block = first_element / 64;
  const int shift = static_cast<int>(first_element % 64);
  const int64_t words = (columns + 63) / 64;
  uint64_t current = philox_bits(seed, threshold, block);
  for (int64_t w = 0; w < words; ++w) {
    const bool last = w + 1 == words;
    if (last && shift + (columns - 64 * w) <= 64) {
      bits[w] = current >> shift;
      return;
    }
    const uint64_t next = philox_bits(seed, threshold, block + static_cast<uint64_t>(w) + 1);
    bits[w] = shift ? current >> shift | next << (64 - shift) : current;
    current = next;
  }
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
