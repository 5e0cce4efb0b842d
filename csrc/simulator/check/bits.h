// Ranges of bits in arrays of 64-bit words.
#pragma once

#include <bit>
#include <cstdint>

namespace fused_peft::sim {

// `count` ones from bit `first` on; count <= 64 - first.
constexpr uint64_t ones(uint64_t first, uint64_t count) {
  return count == 0 ? 0 : (~uint64_t{0} >> (64 - count)) << first;
}

// Calls visit(word index, mask) for the words of [first, first + count).
template <class Visit>
inline void for_words(uint64_t first, uint64_t count, Visit visit) {
  while (count > 0) {
    const uint64_t bit = first & 63;
    const uint64_t here = count < 64 - bit ? count : 64 - bit;
    visit(first >> 6, ones(bit, here));
    first += here;
    count -= here;
  }
}

inline void set_bits(uint64_t* words, uint64_t first, uint64_t count) {
  for_words(first, count, [&](uint64_t word, uint64_t mask) { words[word] |= mask; });
}

inline void clear_bits(uint64_t* words, uint64_t first, uint64_t count) {
  for_words(first, count, [&](uint64_t word, uint64_t mask) { words[word] &= ~mask; });
}

inline bool all_bits(const uint64_t* words, uint64_t first, uint64_t count) {
  uint64_t missing = 0;
  for_words(first, count, [&](uint64_t word, uint64_t mask) { missing |= mask & ~words[word]; });
  return missing == 0;
}

}  // namespace fused_peft::sim
