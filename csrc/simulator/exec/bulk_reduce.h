// Element-wise reductions of bulk copies.
#pragma once

#include <cstddef>

#include "simulator/exec/bulk.h"

namespace fused_peft::sim {

// to[i] = op(to[i], from[i]) for the elements of `type` in `bytes` bytes.
void reduce_bytes(Reduction op, Type type, std::byte* to, const std::byte* from, std::size_t bytes);
// Whether the ISA has this reduction for the type.
bool has_reduction(Reduction op, Type type);

}  // namespace fused_peft::sim
