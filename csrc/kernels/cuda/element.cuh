// The 16-bit element types of the kernels and their tensor-core instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/ptx/mma.cuh"

namespace fused_peft::cuda {

template <class Element>
struct ElementTraits;

template <>
struct ElementTraits<__nv_bfloat16> {
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1);
  }
  __device__ static float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
  __device__ static __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }
  __device__ static uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  // Both halves of a register, exactly.
  __device__ static float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
};

template <>
struct ElementTraits<__half> {
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_f16(d, a, b0, b1);
  }
  __device__ static float to_float(__half v) { return __half2float(v); }
  __device__ static __half from_float(float v) { return __float2half_rn(v); }
  __device__ static uint32_t pack(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float2 unpack(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
};

// d += a b, m16n8k16.
template <class Element>
__device__ inline void mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ElementTraits<Element>::mma(d, a, b0, b1);
}

// The tensor-core value nearest to v, as the bits of a float.
__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(v));
  return bits;
}

// d += a b with a in 16-bit elements and b in float32, to float32's precision: a is exact in tf32, b is the sum of two tf32
// values (22 bits of its 24). m16n8k16 as two m16n8k8: lane t of a group holds elements 2t and 2t + 1 of each half
// of k, which stand for k = t and t + 4 of the instruction; a and b agree on that, and a sum has no order.
// b0 holds the elements (2t, 2t+1) of the first half, b1 those of the second.
template <class Element>
__device__ inline void mma16_float_b(float (&d)[4], const uint32_t (&a)[4], float2 b0, float2 b1) {
  const float2 b[2] = {b0, b1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 upper = ElementTraits<Element>::unpack(a[2 * half]);
    const float2 lower = ElementTraits<Element>::unpack(a[2 * half + 1]);
    const uint32_t parts[4] = {__float_as_uint(upper.x), __float_as_uint(lower.x), __float_as_uint(upper.y),
                               __float_as_uint(lower.y)};
    const uint32_t hi0 = to_tf32(b[half].x), hi1 = to_tf32(b[half].y);
    const uint32_t lo0 = to_tf32(b[half].x - __uint_as_float(hi0));
    const uint32_t lo1 = to_tf32(b[half].y - __uint_as_float(hi1));
    ptx::mma_m16n8k8_tf32(d, parts, lo0, lo1);
    ptx::mma_m16n8k8_tf32(d, parts, hi0, hi1);
  }
}

}  // namespace fused_peft::cuda
