// Directed rounding of IEEE operations, by the processor's own rounding control.
#pragma once

#include <immintrin.h>

#include "simulator/core/decoder.h"
#include "simulator/core/warp.h"
#include "simulator/exec/numeric.h"

namespace fused_peft::sim {

// Sets the rounding mode of SSE and AVX arithmetic while it lives. The barriers keep the
// arithmetic, which reads its operands from memory and stores its results there, between
// constructor and destructor.
class RoundingScope {
 public:
  explicit RoundingScope(Rounding rounding) : saved_(_mm_getcsr()) {
    unsigned mode = _MM_ROUND_NEAREST;
    if (rounding == Rounding::kZero) mode = _MM_ROUND_TOWARD_ZERO;
    if (rounding == Rounding::kDown) mode = _MM_ROUND_DOWN;
    if (rounding == Rounding::kUp) mode = _MM_ROUND_UP;
    _mm_setcsr((saved_ & ~unsigned{_MM_ROUND_MASK}) | mode);
    asm volatile("" ::: "memory");
  }
  ~RoundingScope() {
    asm volatile("" ::: "memory");
    _mm_setcsr(saved_);
  }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;

 private:
  unsigned saved_;
};

// A handler run in the rounding mode of Instr::variant.
template <Handler kHandler>
Step in_rounding_mode(Warp& warp, const Instr& instr, LaneMask mask) {
  const RoundingScope scope(static_cast<Rounding>(instr.variant));
  return kHandler(warp, instr, mask);
}

// .rn .rz .rm .rp, or `otherwise` where the instruction has none.
inline Rounding take_rounding(Decoding& d, Rounding otherwise = Rounding::kNearestEven) {
  const std::string_view text = d.take_one({".rn", ".rz", ".rm", ".rp"});
  if (text == ".rn") return Rounding::kNearestEven;
  if (text == ".rz") return Rounding::kZero;
  if (text == ".rm") return Rounding::kDown;
  if (text == ".rp") return Rounding::kUp;
  return otherwise;
}

}  // namespace fused_peft::sim
