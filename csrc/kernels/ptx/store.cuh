// Two floats in one store. The compiler splits a float2 store where the accumulators come out of a
// loop.
#pragma once

#include <cstdint>

namespace fused_peft::ptx {

__device__ inline void store_global_v2(float* global, float a, float b) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};\n" ::"l"(global), "f"(a), "f"(b) : "memory");
}

__device__ inline void store_shared_v2(uint32_t shared, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(shared), "f"(a), "f"(b) : "memory");
}

}  // namespace fused_peft::ptx
