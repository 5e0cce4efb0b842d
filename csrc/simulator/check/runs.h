// The lanes' addresses of one access as ranges of bytes.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simulator/core/types.h"

namespace fused_peft::sim {

struct Run {
  uint64_t begin;
  uint64_t bytes;
  uint64_t end() const { return begin + bytes; }
};

// Bit l: address[l] == address[l - 1] + step.
inline LaneMask lanes_following(const uint64_t* address, uint64_t step) {
  LaneMask follows = 0;
#ifdef __AVX2__
  const __m256i steps = _mm256_set1_epi64x(static_cast<int64_t>(step));
  for (int lane = 0; lane < kLanes - 4; lane += 4) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address + lane));
    const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address + lane + 1));
    const __m256i equal = _mm256_cmpeq_epi64(_mm256_add_epi64(here, steps), next);
    follows |= static_cast<LaneMask>(_mm256_movemask_pd(_mm256_castsi256_pd(equal))) << (lane + 1);
  }
  for (int lane = kLanes - 3; lane < kLanes; ++lane) {
#else
  for (int lane = 1; lane < kLanes; ++lane) {
#endif
    follows |= LaneMask{address[lane] == address[lane - 1] + step} << lane;
  }
  return follows;
}

// Neighbouring lanes that touch neighbouring (or the same) bytes make one range. Ranges may
// overlap.
struct Runs {
  int count = 0;
  Run run[kLanes];

  Runs(const uint64_t* address, uint32_t bytes, LaneMask lanes) {
    if (lanes == kFullMask) {
      const LaneMask starts = ~lanes_following(address, bytes);
      if (starts == 1) {
        run[count++] = {address[0], uint64_t{bytes} * kLanes};
        return;
      }
      if (lanes_following(address, 0) == kFullMask - 1) {
        run[count++] = {address[0], bytes};
        return;
      }
      for (LaneMask left = starts; left != 0; left &= left - 1) {
        const int lane = std::countr_zero(left);
        const LaneMask behind = left & (left - 1);
        const int end = behind == 0 ? kLanes : std::countr_zero(behind);
        run[count++] = {address[lane], uint64_t{bytes} * static_cast<uint64_t>(end - lane)};
      }
      return;
    }
    for (LaneMask left = lanes; left != 0; left &= left - 1) {
      const uint64_t at = address[std::countr_zero(left)];
      if (count > 0) {
        Run& last = run[count - 1];
        if (at == last.end()) {
          last.bytes += bytes;
          continue;
        }
        if (at >= last.begin && at + bytes <= last.end()) continue;
      }
      run[count++] = {at, bytes};
    }
  }
};

// The cells of kCell bytes that [begin, begin + bytes) touches: visit(cell, mask of its bytes, bit
// 0 the first).
template <uint32_t kCell, class Visit>
[[gnu::always_inline]] inline void for_cells(uint64_t begin, uint64_t bytes, const Visit& visit) {
  constexpr uint32_t kAll = kCell == 32 ? ~0u : (1u << kCell) - 1;
  uint64_t cell = begin / kCell;
  uint32_t first = static_cast<uint32_t>(begin % kCell);
  while (bytes > 0) {
    const uint64_t here = bytes < kCell - first ? bytes : kCell - first;
    visit(cell, (kAll >> (kCell - here)) << first);
    ++cell;
    first = 0;
    bytes -= here;
  }
}

// Lanes whose address is in [lowest, highest].
inline LaneMask lanes_within(const uint64_t* address, LaneMask lanes, uint64_t lowest,
                             uint64_t highest) {
  if (highest < lowest) return 0;
  const uint64_t span = highest - lowest;  // below 2^63
  uint64_t outside = 0;                    // its top bit
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t offset = address[lane] - lowest;
    outside |= offset | (span - offset);
  }
  if (outside >> 63 == 0) [[likely]]
    return lanes;
  LaneMask inside = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    inside |= LaneMask{address[lane] - lowest <= span} << lane;
  }
  return inside & lanes;
}

// Bit per lane: lanes whose bytes all satisfy `good(address)`.
template <class Good>
inline LaneMask lanes_where(const uint64_t* address, LaneMask lanes, Good good) {
  LaneMask result = 0;
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if (good(address[lane])) result |= LaneMask{1} << lane;
  }
  return result;
}

}  // namespace fused_peft::sim
