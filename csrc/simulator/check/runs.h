// The lanes' addresses of one access as ranges of bytes.
#pragma once

#include <bit>
#include <cstdint>

#include "simulator/core/types.h"

namespace fused_peft::sim {

struct Run {
  uint64_t begin;
  uint64_t bytes;
  uint64_t end() const { return begin + bytes; }
};

// Neighbouring lanes that touch neighbouring (or the same) bytes make one range. Ranges may overlap.
struct Runs {
  int count = 0;
  Run run[kLanes];

  Runs(const uint64_t* address, uint32_t bytes, LaneMask lanes) {
    if (lanes == kFullMask) {
      uint64_t uneven = 0;
      for (int lane = 1; lane < kLanes; ++lane) {
        uneven |= (address[lane] - address[lane - 1]) ^ bytes;
      }
      if (uneven == 0) {
        run[count++] = {address[0], uint64_t{bytes} * kLanes};
        return;
      }
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

// The cells of kCell bytes that [begin, begin + bytes) touches: visit(cell, mask of its bytes, bit 0 the first).
template <uint32_t kCell, class Visit>
inline void for_cells(uint64_t begin, uint64_t bytes, Visit visit) {
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
inline LaneMask lanes_within(const uint64_t* address, LaneMask lanes, uint64_t lowest, uint64_t highest) {
  LaneMask inside = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    inside |= LaneMask{address[lane] >= lowest && address[lane] <= highest} << lane;
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
