// What atom and red compute (PTX ISA 9.7.13): functions of the old value and the operands b and c.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simulator/exec/numeric.h"

namespace fused_peft::sim::atomic_ops {

struct Bits128 {
  uint64_t low = 0, high = 0;
  bool operator==(const Bits128&) const = default;
};

struct Exchange {
  template <class T>
  static T apply(T, T b, T) {
    return b;
  }
};
struct CompareSwap {
  template <class T>
  static T apply(T old, T b, T c) {
    return old == b ? c : old;
  }
};
struct And {
  template <class T>
  static T apply(T old, T b, T) {
    return old & b;
  }
};
struct Or {
  template <class T>
  static T apply(T old, T b, T) {
    return old | b;
  }
};
struct Xor {
  template <class T>
  static T apply(T old, T b, T) {
    return old ^ b;
  }
};
struct Add {
  template <class T>
  static T apply(T old, T b, T) {
    return static_cast<T>(old + b);
  }
};
struct Increment {
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t) { return old >= b ? 0 : old + 1; }
};
struct Decrement {
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t) {
    return old == 0 || old > b ? b : old - 1;
  }
};

// min and max of integers of type S, which lie in memory as T.
template <class S>
struct Min {
  template <class T>
  static T apply(T old, T b, T) {
    return static_cast<T>(std::min(static_cast<S>(old), static_cast<S>(b)));
  }
};
template <class S>
struct Max {
  template <class T>
  static T apply(T old, T b, T) {
    return static_cast<T>(std::max(static_cast<S>(old), static_cast<S>(b)));
  }
};

// In shared memory subnormals are kept, in global memory flushed to zero of their sign.
template <bool kFlush>
struct AddF32 {
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t) {
    const float x = float_of(old);
    const float y = float_of(b);
    return bits_of(canonical(kFlush ? flush(flush(x) + flush(y)) : x + y));
  }
};
struct AddF64 {
  static uint64_t apply(uint64_t old, uint64_t b, uint64_t) {
    return std::bit_cast<uint64_t>(std::bit_cast<double>(old) + std::bit_cast<double>(b));
  }
};

// 16-bit floating point, subnormals kept (.noftz). A double holds every sum of two values exactly.
enum class HalfOp { kAdd, kMin, kMax };

template <class Format, HalfOp kOp>
struct Half {
  static uint16_t apply(uint16_t old, uint16_t b, uint16_t) {
    const double x = decode<Format>(old);
    const double y = decode<Format>(b);
    if (kOp == HalfOp::kAdd)
      return x + y != x + y ? Format::kNan : encode<Format>(x + y, Rounding::kNearestEven);
    if (x != x || y != y) return x == x ? old : (y == y ? b : Format::kNan);
    if (x == y) return kOp == HalfOp::kMin ? old | b : old & b;  // -0 < +0
    return (x < y) == (kOp == HalfOp::kMin) ? old : b;
  }
};
template <class Format, HalfOp kOp>
struct HalfPair {
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t) {
    const auto half = [&](int shift) {
      return uint32_t{Half<Format, kOp>::apply(static_cast<uint16_t>(old >> shift),
                                               static_cast<uint16_t>(b >> shift), 0)}
             << shift;
    };
    return half(0) | half(16);
  }
};

}  // namespace fused_peft::sim::atomic_ops
