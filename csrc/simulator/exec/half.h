// Loops over f16 and bf16 lanes.
#pragma once

#include <immintrin.h>

#include "simulator/exec/numeric.h"

namespace fused_peft::sim {

// Two formats, each with from(): bits to floats, exact, and to(): floats to bits, to nearest even,
// NaN to 0x7fff. `count` is a multiple of 8.
struct F16Lanes {
  using Format = F16Format;
  static void from(const uint16_t* bits, float* values, int count) {
    for (int i = 0; i < count; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i));
      _mm256_storeu_ps(values + i, _mm256_cvtph_ps(half));
    }
  }
  static void to(const float* values, uint16_t* bits, int count) {
    for (int i = 0; i < count; i += 8) {
      const __m256 value = _mm256_loadu_ps(values + i);
      const __m256 nan = _mm256_set1_ps(float_of(F32Format::kNan));  // to 0x7fff
      const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
      const __m128i half =
          _mm256_cvtps_ph(_mm256_blendv_ps(value, nan, is_nan), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bits + i), half);
    }
  }
};
struct BF16Lanes {
  using Format = BF16Format;
  static void from(const uint16_t* bits, float* values, int count) {
    for (int i = 0; i < count; ++i) values[i] = float_of_bf16(bits[i]);
  }
  static void to(const float* values, uint16_t* bits, int count) {
    for (int i = 0; i < count; ++i) bits[i] = bf16_of(values[i]);
  }
};

}  // namespace fused_peft::sim
