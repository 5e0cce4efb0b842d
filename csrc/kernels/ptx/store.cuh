// Stores of several words at once. The compiler splits a store of float2 or uint4 where its words
// come out of a loop or are also used one by one, and each part then touches every sector.
#pragma once

#include <cstdint>

namespace fused_peft::ptx {

__device__ inline void store_global_v2(float* global, float a, float b) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};\n" ::"l"(global), "f"(a), "f"(b) : "memory");
}

__device__ inline void store_global_v2(void* global, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(global), "r"(a), "r"(b) : "memory");
}

__device__ inline void store_global_v4(float* global, float4 v) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

__device__ inline void store_global_v4(void* global, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ inline void store_shared_v2(uint32_t shared, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(shared), "f"(a), "f"(b) : "memory");
}

__device__ inline void store_shared_u32(uint32_t shared, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(shared), "r"(v) : "memory");
}

__device__ inline uint32_t load_shared_u32(uint32_t shared) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(v) : "r"(shared) : "memory");
  return v;
}

}  // namespace fused_peft::ptx
