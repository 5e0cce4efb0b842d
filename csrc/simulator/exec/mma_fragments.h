// How the matrices of mma lie in a warp's registers (PTX ISA, "Matrix fragments for mma"). With
// group = lane / 4 and t = lane % 4:
//   A: register r holds row group + 8 * (r % 2), elements 4 n (r / 2) + n t ... of it (n elements a
//   register; with 8
//      rows r counts chunks of 4 n elements alone);
//   B: register r holds column group, elements 4 n r + n t ...;
//   C, D: registers 2 h and 2 h + 1 hold row group + 8 h, columns 2 t and 2 t + 1; of halves
//   register h both.
// So four neighbouring lanes hold 4 n consecutive elements of one row of A or column of B.
#pragma once

#include <immintrin.h>

#include "simulator/core/lanes.h"
#include "simulator/core/validity.h"
#include "simulator/exec/half.h"

namespace fused_peft::sim {

// Registers of each matrix among the instruction's operands.
struct MmaOperands {
  int num_a, num_b, num_c;
  const Operand& a(const Instr& instr, int i) const { return instr.source(i); }
  const Operand& b(const Instr& instr, int i) const { return instr.source(num_a + i); }
  const Operand& c(const Instr& instr, int i) const { return instr.source(num_a + num_b + i); }
};

template <class T>
void store_register(Warp& warp, const Operand& dest, const T* values, LaneMask mask) {
  store_lanes(dest_lanes<T>(warp, dest), values, mask);
}

// Two registers of 32-bit elements <-> 8 rows of 8.
inline void join_rows(const uint32_t* even, const uint32_t* odd, float* rows) {
  for (int group = 0; group < 8; ++group) {
    const __m128 e = _mm_load_ps(reinterpret_cast<const float*>(even) + 4 * group);
    const __m128 o = _mm_load_ps(reinterpret_cast<const float*>(odd) + 4 * group);
    _mm_store_ps(rows + 8 * group, _mm_unpacklo_ps(e, o));
    _mm_store_ps(rows + 8 * group + 4, _mm_unpackhi_ps(e, o));
  }
}
inline void split_rows(const float* rows, uint32_t* even, uint32_t* odd) {
  for (int group = 0; group < 8; ++group) {
    const __m128 low = _mm_load_ps(rows + 8 * group), high = _mm_load_ps(rows + 8 * group + 4);
    _mm_store_ps(reinterpret_cast<float*>(even) + 4 * group, _mm_shuffle_ps(low, high, 0x88));
    _mm_store_ps(reinterpret_cast<float*>(odd) + 4 * group, _mm_shuffle_ps(low, high, 0xdd));
  }
}

// to[j][i] = from[i][j] of 8 x 8 elements of 16 bits; rows of both are 16 bytes apart and `to` is
// aligned.
inline void transpose_halves(const __m128i from[8], __m128i* to) {
  __m128i a[8], b[8];  // in registers: unrolled early
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(from[i], from[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(from[i], from[i + 4]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm_store_si128(to + 2 * i, _mm_unpacklo_epi16(b[i], b[i + 4]));
    _mm_store_si128(to + 2 * i + 1, _mm_unpackhi_epi16(b[i], b[i + 4]));
  }
}

// ---- validity: a row of A taints the row of D, a column of B the column, an element of C the
// element

// Bit 4 g of the result: all four lanes of group g are set.
constexpr LaneMask whole_groups(LaneMask lanes) {
  lanes &= lanes >> 1;
  return lanes & lanes >> 2 & 0x11111111u;
}

// Lanes of the registers of D that hold the columns 2 t (odd: 2 t + 1) whose bit 4 column is set.
inline LaneMask lanes_of_columns(LaneMask columns, bool odd) {
  return _pext_u32(columns, odd ? 0x10101010u : 0x01010101u) * 0x11111111u;
}

// Sets the validity of D. kPairs: a register of D holds both columns.
inline void propagate_mma_validity(Warp& warp, const Instr& instr, LaneMask mask,
                                   MmaOperands operands, int rows, bool pairs) {
  if (warp.valid == nullptr) return;
  LaneMask all = kFullMask;
  for (int i = 0; i < instr.num_sources; ++i) all &= valid_lanes(warp, instr.source(i));
  if (all == kFullMask) [[likely]] {
    for (int i = 0; i < instr.num_dests; ++i) set_valid(warp, instr.dest(i), mask, kFullMask);
    return;
  }
  const int halves = rows / 8;
  LaneMask columns = kFullMask;
  for (int i = 0; i < operands.num_b; ++i) columns &= valid_lanes(warp, operands.b(instr, i));
  columns = whole_groups(columns);
  const LaneMask even = lanes_of_columns(columns, false), odd = lanes_of_columns(columns, true);
  LaneMask result[4];
  for (int i = 0; i < operands.num_c; ++i) {
    const int half = pairs ? i : i / 2;
    LaneMask row = kFullMask;
    for (int r = half; r < operands.num_a; r += halves)
      row &= valid_lanes(warp, operands.a(instr, r));
    const LaneMask column = pairs ? even & odd : i % 2 == 0 ? even : odd;
    result[i] = valid_lanes(warp, operands.c(instr, i)) & whole_groups(row) * 15 & column;
  }
  for (int i = 0; i < operands.num_c; ++i) set_valid(warp, instr.dest(i), mask, result[i]);
}

}  // namespace fused_peft::sim
