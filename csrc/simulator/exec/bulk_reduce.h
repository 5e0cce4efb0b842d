// Element-wise reductions of bulk copies.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simulator/core/types.h"

namespace fused_peft::sim {

enum class Reduction : uint8_t { kNone, kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor };

// to[i] = op(to[i], from[i]) for the elements in `bytes` bytes.
using Combine = void (*)(std::byte* to, const std::byte* from, std::size_t bytes);
// nullptr where the ISA has no such reduction of the type.
Combine find_reduction(Reduction op, Type type);

}  // namespace fused_peft::sim
