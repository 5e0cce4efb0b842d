// The 16-bit element types of the kernels and their tensor-core instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/store.cuh"

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

__device__ inline float4 add_quads(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Four consecutive elements of global memory, at a multiple of their size.
__device__ inline void store_quad(float* to, float4 v) { ptx::store_global_v4(to, v); }
template <class Element>
__device__ inline void store_quad(Element* to, float4 v) {
  using Traits = ElementTraits<Element>;
  ptx::store_global_v2(to, Traits::pack(v.x, v.y), Traits::pack(v.z, v.w));
}

// The tensor-core value nearest to v, as the bits of a float.
__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(v));
  return bits;
}

// Float32 elements as sums of three tf32 values: terms[half][i], a value's terms from the largest,
// of the elements (2t, 2t + 1) of each half of k.
struct FloatTerms {
  uint32_t terms[2][3][2];

  __device__ FloatTerms(float2 b0, float2 b1) {
    const float2 b[2] = {b0, b1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float left[2] = {b[half].x, b[half].y};
#pragma unroll
      for (int term = 0; term < 3; ++term)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          terms[half][term][i] = to_tf32(left[i]);
          left[i] -= __uint_as_float(terms[half][term][i]);
        }
    }
  }
};

// d += a b with a in 16-bit elements and b in float32: a is exact in tf32, b is the sum of three
// tf32 values, smallest first. m16n8k16 as two m16n8k8: lane t of a group holds elements 2t and
// 2t + 1 of each half of k, which stand for k = t and t + 4 of the instruction; a and b agree on
// that, and a sum has no order. The six products meet in registers of their own and are added to d
// once: d is then rounded once per step, and to nearest, which the tensor core's own accumulation
// is not.
template <class Element>
__device__ inline void mma16_float_b(float (&d)[4], const uint32_t (&a)[4], const FloatTerms& b) {
  float product[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 upper = ElementTraits<Element>::unpack(a[2 * half]);
    const float2 lower = ElementTraits<Element>::unpack(a[2 * half + 1]);
    const uint32_t parts[4] = {__float_as_uint(upper.x), __float_as_uint(lower.x),
                               __float_as_uint(upper.y), __float_as_uint(lower.y)};
#pragma unroll
    for (int term = 2; term >= 0; --term)
      ptx::mma_m16n8k8_tf32(product, parts, b.terms[half][term][0], b.terms[half][term][1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}

}  // namespace fused_peft::cuda
