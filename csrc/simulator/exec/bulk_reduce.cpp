#include "simulator/exec/bulk_reduce.h"

#include <cstring>

#include "simulator/exec/atomic_ops.h"

namespace fused_peft::sim {
namespace {

using namespace atomic_ops;

template <class T, class Op>
void combine(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t at = 0; at + sizeof(T) <= bytes; at += sizeof(T)) {
    T old, value;
    std::memcpy(&old, to + at, sizeof old);
    std::memcpy(&value, from + at, sizeof value);
    const T result = Op::apply(old, value, value);
    std::memcpy(to + at, &result, sizeof result);
  }
}

template <class T, class S>
Combine integer(Reduction op) {
  switch (op) {
    case Reduction::kAdd: return combine<T, Add>;
    case Reduction::kMin: return combine<T, Min<S>>;
    case Reduction::kMax: return combine<T, Max<S>>;
    case Reduction::kAnd: return combine<T, And>;
    case Reduction::kOr: return combine<T, Or>;
    case Reduction::kXor: return combine<T, Xor>;
    default: return nullptr;
  }
}

template <class Format>
Combine half(Reduction op) {
  switch (op) {
    case Reduction::kAdd: return combine<uint16_t, Half<Format, HalfOp::kAdd>>;
    case Reduction::kMin: return combine<uint16_t, Half<Format, HalfOp::kMin>>;
    case Reduction::kMax: return combine<uint16_t, Half<Format, HalfOp::kMax>>;
    default: return nullptr;
  }
}

}  // namespace

Combine find_reduction(Reduction op, Type type) {
  if (type == Type::kU32 && op == Reduction::kInc) return combine<uint32_t, Increment>;
  if (type == Type::kU32 && op == Reduction::kDec) return combine<uint32_t, Decrement>;
  switch (type) {
    case Type::kU32:
    case Type::kB32: return integer<uint32_t, uint32_t>(op);
    case Type::kS32: return integer<uint32_t, int32_t>(op);
    case Type::kU64:
    case Type::kB64: return integer<uint64_t, uint64_t>(op);
    case Type::kS64: return integer<uint64_t, int64_t>(op);
    case Type::kF16: return half<F16Format>(op);
    case Type::kBF16: return half<BF16Format>(op);
    case Type::kF32: return op == Reduction::kAdd ? combine<uint32_t, AddF32<true>> : nullptr;
    case Type::kF64: return op == Reduction::kAdd ? combine<uint64_t, AddF64> : nullptr;
    default: return nullptr;
  }
}

}  // namespace fused_peft::sim
