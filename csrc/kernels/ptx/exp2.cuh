// ex2.approx: 2^x within 2 units in the last place; subnormal results are 0. exp2f spends three
// more instructions on those.
#pragma once

namespace fused_peft::ptx {

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fused_peft::ptx
