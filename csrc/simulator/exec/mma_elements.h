// Elements of the tensor core's operands, as floats: every product of two of them and, of the
// integer types, every sum that an instruction forms is exact in single precision.
#pragma once

#include "simulator/core/types.h"
#include "simulator/exec/half.h"

namespace fused_peft::sim {

// Each has kPerRegister, how many elements a 32-bit register holds, and load(): `count` registers
// (a multiple of 8) to floats, lane after lane. Those of 16 bits have widen(), of 8 elements.
struct F16Elements {
  static constexpr int kPerRegister = 2;
  static __m256 widen(__m128i halves) { return _mm256_cvtph_ps(halves); }
  static void load(const uint32_t* registers, float* values, int count) {
    F16Lanes::from(reinterpret_cast<const uint16_t*>(registers), values, 2 * count);
  }
};

struct BF16Elements {
  static constexpr int kPerRegister = 2;
  static __m256 widen(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < count; ++i) {
      values[2 * i] = float_of(registers[i] << 16);
      values[2 * i + 1] = float_of(registers[i] & 0xffff0000);
    }
  }
};

// The tensor core does not look at the 13 low bits.
struct TF32Elements {
  static constexpr int kPerRegister = 1;
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < count; ++i) values[i] = float_of(registers[i] & 0xffffe000);
  }
};

// Sixteen bytes, each into the low half of 16 bits.
inline __m256i widen_bytes(const uint32_t* registers, int first) {
  const auto* bytes = reinterpret_cast<const char*>(registers) + first;
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// E5M2 is the upper byte of a half.
struct E5M2Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < 4 * count; i += 16) {
      const __m256i halves = _mm256_slli_epi16(widen_bytes(registers, i), 8);
      _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
      _mm256_storeu_ps(values + i + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
    }
  }
};

// E4M3's fields in their places in a half make a value too small by the difference of the biases,
// 2^8. Its NaN, with all bits set, would be 1.875 there.
struct E4M3Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < 4 * count; i += 16) {
      const __m256i bytes = widen_bytes(registers, i);
      const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
      const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)), 7);
      const __m256i halves = _mm256_or_si256(sign, rest);
      _mm256_storeu_ps(values + i, scale(_mm256_castsi256_si128(halves)));
      _mm256_storeu_ps(values + i + 8, scale(_mm256_extracti128_si256(halves, 1)));
    }
  }

 private:
  static __m256 scale(__m128i halves) {
    const __m256 small = _mm256_cvtph_ps(halves);
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), small);
    const __m256 nan = _mm256_cmp_ps(magnitude, _mm256_set1_ps(1.875f), _CMP_EQ_OQ);
    return _mm256_or_ps(_mm256_mul_ps(small, _mm256_set1_ps(256.0f)), nan);
  }
};

struct S8Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    const auto* bytes = reinterpret_cast<const int8_t*>(registers);
    for (int i = 0; i < 4 * count; ++i) values[i] = float(bytes[i]);
  }
};

struct U8Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(registers);
    for (int i = 0; i < 4 * count; ++i) values[i] = float(bytes[i]);
  }
};

template <bool kSigned>
struct Int4Elements {
  static constexpr int kPerRegister = 8;
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < count; ++i) {
      for (unsigned j = 0; j < 8; ++j) {
        const uint32_t shifted = registers[i] << (28 - 4 * j);
        values[8 * i + int(j)] =
            kSigned ? float(int32_t(shifted) >> 28) : float(int32_t(shifted >> 28));
      }
    }
  }
};
using S4Elements = Int4Elements<true>;
using U4Elements = Int4Elements<false>;

}  // namespace fused_peft::sim
