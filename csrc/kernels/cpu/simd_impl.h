// Vectors of the instruction set that the including file names: GCC/Clang vector extensions, so one
// text serves AVX-512, AVX2, SSE2 and NEON; intrinsics only where no extension expresses it.
//
// Included once per instruction set, inside its namespace, after these macros:
//   FUSED_PEFT_ISA             namespace name
//   FUSED_PEFT_VECTOR_BYTES    64, 32 or 16
//   FUSED_PEFT_BF16_DOT        1 where vdpbf16ps exists
//   FUSED_PEFT_F16C            1 where vcvtph2ps exists
#include <cstdint>
#include <cstring>
#if FUSED_PEFT_F16C
#include <immintrin.h>
#endif

#include "kernels/cpu/kernel_table.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

constexpr int kLanes = FUSED_PEFT_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(FUSED_PEFT_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(FUSED_PEFT_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(FUSED_PEFT_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(FUSED_PEFT_VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec broadcast(float value) { return value - Vec{}; }

template <class V>
inline V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store_bits(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// ---- element conversions ---------------------------------------------------------------------

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline Vec load(const float* p) { return load_bits<Vec>(p); }

inline Vec load(const BFloat16* p) {
  const VecU wide = __builtin_convertvector(load_bits<VecH>(p), VecU);
  return reinterpret_cast<Vec>(wide << 16);
}

inline void store(float* p, Vec v) { store_bits(p, v); }

inline void store(BFloat16* p, Vec v) {
#if FUSED_PEFT_BF16_DOT
  store_bits(p, _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const VecU quiet_nan = (bits >> 16) | 0x40U;
  const VecI is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
  store_bits(p, __builtin_convertvector(is_nan ? quiet_nan : rounded, VecH));
#endif
}

#if FUSED_PEFT_F16C
inline Vec load(const Float16* p) {
#if FUSED_PEFT_VECTOR_BYTES == 64
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(load_bits<__m256i>(p)));
#else
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(load_bits<__m128i>(p)));
#endif
}

inline void store(Float16* p, Vec v) {
#if FUSED_PEFT_VECTOR_BYTES == 64
  store_bits(p, _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  store_bits(p, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
// binary16 -> binary32: shift the fields into place and rescale by the exponent bias difference;
// the multiplication also normalises subnormals.
inline float float_from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFU) << 13;
  float value = float_from_bits(magnitude) * 0x1p112F;
  if (magnitude >= 0x7C00U << 13) value = float_from_bits(magnitude | 0x7F800000U);
  return float_from_bits(bits_from_float(value) | sign);
}

// binary32 -> binary16, round to nearest even.
inline uint16_t half_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U)
    return static_cast<uint16_t>(sign | 0x7E00U | (magnitude >> 13 & 0x3FFU));
  if (magnitude >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);
  if (magnitude < 0x38800000U) {  // subnormal: adding 0.5 leaves the rounded field in the low bits
    const uint32_t aligned = bits_from_float(float_from_bits(magnitude) + 0.5F);
    return static_cast<uint16_t>(sign | (aligned - 0x3F000000U));
  }
  const uint32_t rebiased = magnitude - (112U << 23);
  return static_cast<uint16_t>(sign | ((rebiased + 0xFFFU + ((rebiased >> 13) & 1U)) >> 13));
}

inline Vec load(const Float16* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = float_from_half(p[i].bits);
  return v;
}

inline void store(Float16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = half_from_float(v[i]);
}
#endif

// The first count elements, the other lanes zero. No byte past them is read.
template <class T>
inline Vec load_partial(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
inline void store_partial(T* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Calls fn with a null pointer of the element type: a switch once, templates below it.
template <class Fn>
inline void with_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(static_cast<const float*>(nullptr));
    case DType::kBFloat16: return fn(static_cast<const BFloat16*>(nullptr));
    case DType::kFloat16: return fn(static_cast<const Float16*>(nullptr));
  }
}

// ---- masks -----------------------------------------------------------------------------------

inline VecU lane_bits() {
  VecU v;
  for (int i = 0; i < kLanes; ++i) v[i] = 1U << i;
  return v;
}

// Bits [column, column + kLanes) of a mask row; column is a multiple of kLanes.
inline uint32_t mask_bits(const uint64_t* row, int64_t column) {
  const uint64_t word = row[column / 64] >> (column % 64);
  return static_cast<uint32_t>(word & ((uint64_t{1} << kLanes) - 1));
}

inline Vec keep_lanes(Vec v, uint32_t bits) {
  const VecI kept = ((bits - VecU{}) & lane_bits()) != 0U;
  return reinterpret_cast<Vec>(reinterpret_cast<VecI>(v) & kept);
}

// ---- transposition ---------------------------------------------------------------------------

// a[first], b[first], a[first + 1], b[first + 1], ...
template <int kFirst>
inline Vec zip(Vec a, Vec b) {
#if defined(__clang__)
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i % 2 == 0 ? a[kFirst + i / 2] : b[kFirst + i / 2];
  return v;
#else
  VecI indices;
  for (int i = 0; i < kLanes; ++i) indices[i] = kFirst + i / 2 + (i % 2) * kLanes;
  return __builtin_shuffle(a, b, indices);
#endif
}

// In-register transposition of a kLanes x kLanes block of 32-bit lanes: log2(kLanes) rounds, each
// interleaving row i with row i + kLanes / 2.
inline void transpose_block(Vec (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int width = 1; width < kLanes; width *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip<0>(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = zip<kLanes / 2>(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
