// Constants of the text in the types that instructions read.
#pragma once

#include <cstdint>

#include "simulator/core/types.h"

namespace fused_peft::sim {

// The bits in `type` of an integer (wraps) or a float (`bits` of an f32 where is_single, else of an
// f64; rounded to nearest even). False where the ISA has no such immediate: an integer for .f32, a
// float for .b16 or .pred.
bool immediate_bits(bool is_float, bool is_single, uint64_t bits, Type type, uint64_t* out);

}  // namespace fused_peft::sim
