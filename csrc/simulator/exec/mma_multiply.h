// D = A B + C of one warp's matrices, in registers' order: A and B as chunks of kWidth consecutive
// k, which is what the four lanes of a group hold together.
#pragma once

#include <immintrin.h>

namespace fused_peft::sim {

// rows[j][i] = columns[i][j] of an 8 x 8 block; rows of `columns` are `stride` floats apart.
inline void transpose8(const float* columns, int stride, __m256* rows) {
  // Unrolled before the arrays would become memory.
  __m256 c[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) c[i] = _mm256_loadu_ps(columns + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(c[i], c[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(c[i], c[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    c[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    c[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    c[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    c[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x31);
  }
}

// b[chunk][8 columns][kWidth] to rows[chunk * kWidth + j] of 8 columns.
template <int kChunks, int kWidth>
inline void to_rows(const float* b, __m256* rows) {
  static_assert(kWidth == 4 || kWidth % 8 == 0);
  for (int chunk = 0; chunk < kChunks; ++chunk, rows += kWidth) {
    const float* columns = b + chunk * 8 * kWidth;
    if constexpr (kWidth == 4) {
      for (int j = 0; j < 4; ++j) {
        rows[j] =
            _mm256_setr_ps(columns[j], columns[4 + j], columns[8 + j], columns[12 + j],
                           columns[16 + j], columns[20 + j], columns[24 + j], columns[28 + j]);
      }
    } else {
      for (int j = 0; j < kWidth; j += 8) transpose8(columns + j, kWidth, rows + j);
    }
  }
}

// a[chunk][kRows][kWidth], rows of B as to_rows() gives them, d[kRows][8] += A B; every element
// sums in order of k, with one rounding a step.
template <int kRows, int kChunks, int kWidth>
inline void accumulate(const float* a, const __m256* rows, float* d) {
  static_assert(kRows % 8 == 0);
  for (int m = 0; m < kRows; m += 8) {
    __m256 sums[8];
    for (int i = 0; i < 8; ++i) sums[i] = _mm256_load_ps(d + (m + i) * 8);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const float* block = a + (chunk * kRows + m) * kWidth;
      for (int j = 0; j < kWidth; ++j) {
        const __m256 row = rows[chunk * kWidth + j];
        for (int i = 0; i < 8; ++i) {
          sums[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(block + i * kWidth + j), row, sums[i]);
        }
      }
    }
    for (int i = 0; i < 8; ++i) _mm256_store_ps(d + (m + i) * 8, sums[i]);
  }
}

template <int kRows, int kChunks, int kWidth>
inline void multiply(const float* a, const float* b, float* d) {
  __m256 rows[kChunks * kWidth];
  to_rows<kChunks, kWidth>(b, rows);
  accumulate<kRows, kChunks, kWidth>(a, rows, d);
}

}  // namespace fused_peft::sim
