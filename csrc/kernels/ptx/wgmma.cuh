// wgmma (sm_90a): d += a b by a warpgroup, d [64, N] in float32 registers, b and mostly a in shared
// memory. m64nNk16 on bfloat16 or float16.
#pragma once

#include <cstdint>

namespace fused_peft::ptx {

// Before the first wgmma, and wherever other instructions have changed its registers.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Until at most N of the newest groups are pending.
template <int N>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

// Keeps the compiler from moving what uses an accumulator across the wait for it.
template <int kCount>
__device__ inline void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Matrix descriptor of an operand in swizzled lines of kLine bytes. k major: lines are rows of 64 k
// (of 128 bytes), stride_bytes from 8 rows to the next 8, leading_bytes is not used. Otherwise
// lines are kLine / 2 rows' elements of one k, stride_bytes from 8 k to the next 8, leading_bytes
// from a line's rows to the next.
template <int kLine = 128>
__device__ inline uint64_t swizzled_descriptor(uint32_t shared, uint32_t leading_bytes,
                                               uint32_t stride_bytes) {
  static_assert(kLine == 32 || kLine == 128);
  constexpr uint64_t kSwizzle = uint64_t{kLine == 128 ? 1 : 3} << 62;
  return kSwizzle | uint64_t{stride_bytes >> 4} << 32 | uint64_t{leading_bytes >> 4} << 16 |
         uint64_t{(shared & 0x3ffff) >> 4};
}

// The instruction of N columns. accumulate false: d = a b. kRows: b has its rows side by side (it
// is not k major).
template <int N>
struct Wgmma;

// clang-format off
#define FUSED_PEFT_ACC4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define FUSED_PEFT_ACC8(i) FUSED_PEFT_ACC4(i), FUSED_PEFT_ACC4((i) + 4)
#define FUSED_PEFT_ACC16(i) FUSED_PEFT_ACC8(i), FUSED_PEFT_ACC8((i) + 8)
#define FUSED_PEFT_ACC32(i) FUSED_PEFT_ACC16(i), FUSED_PEFT_ACC16((i) + 16)
#define FUSED_PEFT_ACC64(i) FUSED_PEFT_ACC32(i), FUSED_PEFT_ACC32((i) + 32)
#define FUSED_PEFT_ACC128(i) FUSED_PEFT_ACC64(i), FUSED_PEFT_ACC64((i) + 64)

// Registers of d, as text.
#define FUSED_PEFT_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FUSED_PEFT_D16 FUSED_PEFT_D8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FUSED_PEFT_D32 FUSED_PEFT_D16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSED_PEFT_D64 FUSED_PEFT_D32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSED_PEFT_D128 FUSED_PEFT_D64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// P0 ...: the numbers of the operands behind d.
#define FUSED_PEFT_WGMMA_SHARED(N, COUNT, TYPE, P0, P1, P2, P3)                              \
  asm volatile("{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, " P2 ", 0;\n"            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                \
               " {" FUSED_PEFT_D##COUNT "}, " P0 ", " P1 ", accumulates, 1, 1, 0, " P3 ";\n}\n" \
               : FUSED_PEFT_ACC##COUNT(0)                                                     \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kRows)))
#define FUSED_PEFT_WGMMA_REGISTERS(N, COUNT, TYPE, P0, P1, P2, P3, P4, P5, P6)                \
  asm volatile("{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, " P5 ", 0;\n"            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                \
               " {" FUSED_PEFT_D##COUNT "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4            \
               ", accumulates, 1, 1, " P6 ";\n}\n"                                            \
               : FUSED_PEFT_ACC##COUNT(0)                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),    \
                 "n"(int(kRows)))
#define FUSED_PEFT_WGMMA(N, COUNT, P0, P1, P2, P3, P4, P5, P6)                                \
  template <>                                                                                 \
  struct Wgmma<N> {                                                                           \
    template <bool kBFloat16, bool kRows>                                                     \
    __device__ static void multiply(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) { \
      if constexpr (kBFloat16)                                                                \
        FUSED_PEFT_WGMMA_SHARED(N, COUNT, "bf16", P0, P1, P2, P3);                            \
      else                                                                                    \
        FUSED_PEFT_WGMMA_SHARED(N, COUNT, "f16", P0, P1, P2, P3);                             \
    }                                                                                         \
    /* a in registers: the fragment of mma.m16n8k16 for the warp's 16 rows. */                \
    template <bool kBFloat16, bool kRows>                                                     \
    __device__ static void multiply(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b,    \
                                    bool accumulate) {                                        \
      if constexpr (kBFloat16)                                                                \
        FUSED_PEFT_WGMMA_REGISTERS(N, COUNT, "bf16", P0, P1, P2, P3, P4, P5, P6);             \
      else                                                                                    \
        FUSED_PEFT_WGMMA_REGISTERS(N, COUNT, "f16", P0, P1, P2, P3, P4, P5, P6);              \
    }                                                                                         \
  }

FUSED_PEFT_WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14");
FUSED_PEFT_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22");
FUSED_PEFT_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
FUSED_PEFT_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
FUSED_PEFT_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134");

#undef FUSED_PEFT_WGMMA
#undef FUSED_PEFT_WGMMA_SHARED
#undef FUSED_PEFT_WGMMA_REGISTERS
#undef FUSED_PEFT_ACC4
#undef FUSED_PEFT_ACC8
#undef FUSED_PEFT_ACC16
#undef FUSED_PEFT_ACC32
#undef FUSED_PEFT_ACC64
#undef FUSED_PEFT_ACC128
#undef FUSED_PEFT_D8
#undef FUSED_PEFT_D16
#undef FUSED_PEFT_D32
#undef FUSED_PEFT_D64
#undef FUSED_PEFT_D128
// clang-format on

}  // namespace fused_peft::ptx
