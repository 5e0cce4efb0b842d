// Comparison: setp set.
#include <iterator>
#include <type_traits>

#include "simulator/core/lanes.h"
#include "simulator/core/validity.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/half.h"
#include "simulator/exec/logic.h"

namespace fused_peft::sim {
namespace {

// The ordered comparisons, which a NaN makes false, then the unordered ones, which it makes true.
enum class Compare : uint8_t {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan
};

// What a setp or set does, packed into Instr::variant.
struct Comparison {
  Compare compare = Compare::kEq;
  BoolOp op = BoolOp::kNone;
  bool ftz = false;
  bool second = false;  // setp p|q

  uint32_t pack() const {
    return uint32_t(compare) | uint32_t(op) << 8 | uint32_t{ftz} << 16 | uint32_t{second} << 17;
  }
  static Comparison unpack(uint32_t bits) {
    return {Compare(bits & 0xff), BoolOp(bits >> 8 & 0xff), (bits >> 16 & 1) != 0,
            (bits >> 17 & 1) != 0};
  }
};

template <class T, class Op>
LaneMask lanes_where(const T* a, const T* b, Op op) {
  LaneMask mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    mask |= op(a[lane], b[lane]) ? kLaneBits[size_t(lane)] : 0;
  }
  return mask;
}

template <class T>
LaneMask ordered(Compare compare, const T* a, const T* b) {
  switch (compare) {
    case Compare::kEq: return lanes_where(a, b, [](T x, T y) { return x == y; });
    case Compare::kLt: return lanes_where(a, b, [](T x, T y) { return x < y; });
    case Compare::kLe: return lanes_where(a, b, [](T x, T y) { return x <= y; });
    case Compare::kGt: return lanes_where(a, b, [](T x, T y) { return x > y; });
    default: return lanes_where(a, b, [](T x, T y) { return x >= y; });
  }
}

template <class T>
LaneMask compare_lanes(Compare compare, const T* a, const T* b) {
  if constexpr (!std::is_floating_point_v<T>) {
    return compare == Compare::kNe ? ~ordered(Compare::kEq, a, b) : ordered(compare, a, b);
  } else {
    switch (compare) {
      case Compare::kNan: return lanes_where(a, b, [](T x, T y) { return (x != x) | (y != y); });
      case Compare::kNum: return lanes_where(a, b, [](T x, T y) { return (x == x) & (y == y); });
      case Compare::kNe: return ordered(Compare::kLt, a, b) | ordered(Compare::kGt, a, b);
      // Unordered: true where the opposite ordered one is not.
      case Compare::kEqu: return ~(ordered(Compare::kLt, a, b) | ordered(Compare::kGt, a, b));
      case Compare::kNeu: return ~ordered(Compare::kEq, a, b);
      case Compare::kLtu: return ~ordered(Compare::kGe, a, b);
      case Compare::kLeu: return ~ordered(Compare::kGt, a, b);
      case Compare::kGtu: return ~ordered(Compare::kLe, a, b);
      case Compare::kGeu: return ~ordered(Compare::kLt, a, b);
      default: return ordered(compare, a, b);
    }
  }
}

// The element that a comparison of this kind works on, read from sources 0 and 1.
struct F16Element {};
struct BF16Element {};

template <class T>
LaneMask compare_sources(const Warp& warp, const Instr& instr, Comparison what) {
  if constexpr (std::is_same_v<T, F16Element> || std::is_same_v<T, BF16Element>) {
    using Lanes = std::conditional_t<std::is_same_v<T, F16Element>, F16Lanes, BF16Lanes>;
    float values[2][kLanes];
    for (int i = 0; i < 2; ++i) {
      uint16_t bits[kLanes];
      std::memcpy(bits, lanes_of<uint16_t>(warp, instr.source(i)), sizeof bits);
      if (what.ftz) {
        for (uint16_t& half : bits) half = (half & 0x7c00) == 0 ? half & 0x8000 : half;
      }
      Lanes::from(bits, values[i], kLanes);
    }
    return compare_lanes(what.compare, values[0], values[1]);
  } else {
    const T* a = lanes_of<T>(warp, instr.source(0));
    const T* b = lanes_of<T>(warp, instr.source(1));
    if constexpr (std::is_same_v<T, float>) {
      if (what.ftz) {
        float flushed[2][kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          flushed[0][lane] = flush(a[lane]);
          flushed[1][lane] = flush(b[lane]);
        }
        return compare_lanes(what.compare, flushed[0], flushed[1]);
      }
    }
    return compare_lanes(what.compare, a, b);
  }
}

template <class T>
PredicateLanes comparison_result(const Warp& warp, const Instr& instr, Comparison what) {
  return {compare_sources<T>(warp, instr, what),
          valid_lanes(warp, instr.source(0)) & valid_lanes(warp, instr.source(1))};
}

void write_predicate(Warp& warp, const Operand& dest, LaneMask mask, PredicateLanes result) {
  set_predicate(warp, dest, mask, result.value);
  set_valid(warp, dest, mask, result.valid);
}

template <class T>
Step setp(Warp& warp, const Instr& instr, LaneMask mask) {
  const Comparison what = Comparison::unpack(instr.variant);
  const PredicateLanes test = comparison_result<T>(warp, instr, what);
  const PredicateLanes inverse{~test.value, test.valid};
  if (what.op == BoolOp::kNone) {
    write_predicate(warp, instr.dest(0), mask, test);
    if (what.second) write_predicate(warp, instr.dest(1), mask, inverse);
    return Step::kNext;
  }
  const PredicateLanes other = predicate_lanes(warp, instr.source(2));
  write_predicate(warp, instr.dest(0), mask, combine(what.op, test, other));
  if (what.second) write_predicate(warp, instr.dest(1), mask, combine(what.op, inverse, other));
  return Step::kNext;
}

// setp.f16x2 p|q: p of the low halves, q of the high ones, each combined with the boolean operand.
template <class Lanes>
void compare_pairs(const Warp& warp, const Instr& instr, Comparison what, LaneMask result[2]) {
  float values[2][2][kLanes];  // half, source
  for (int i = 0; i < 2; ++i) {
    const auto* pair = lanes_of<uint32_t>(warp, instr.source(i));
    for (int half = 0; half < 2; ++half) {
      uint16_t bits[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const auto value = uint16_t(pair[lane] >> (16 * half));
        bits[lane] = what.ftz && (value & 0x7c00) == 0 ? value & 0x8000 : value;
      }
      Lanes::from(bits, values[half][i], kLanes);
    }
  }
  for (int half = 0; half < 2; ++half) {
    result[half] = compare_lanes(what.compare, values[half][0], values[half][1]);
  }
}

template <class Lanes>
Step setp_pairs(Warp& warp, const Instr& instr, LaneMask mask) {
  const Comparison what = Comparison::unpack(instr.variant);
  const LaneMask valid = valid_lanes(warp, instr.source(0)) & valid_lanes(warp, instr.source(1));
  LaneMask tests[2];
  compare_pairs<Lanes>(warp, instr, what, tests);
  PredicateLanes results[2];
  for (int half = 0; half < 2; ++half) {
    results[half] = {tests[half], valid};
    if (what.op != BoolOp::kNone) {
      results[half] = combine(what.op, results[half], predicate_lanes(warp, instr.source(2)));
    }
  }
  for (int half = 0; half < 2; ++half) write_predicate(warp, instr.dest(half), mask, results[half]);
  return Step::kNext;
}

// set writes kTrue or zero.
template <class D>
Step write_set(Warp& warp, const Instr& instr, LaneMask mask, PredicateLanes result, D true_value) {
  D out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    out[lane] = (result.value >> lane & 1) ? true_value : D(0);
  store_lanes(dest_lanes<D>(warp, instr.dest(0)), out, mask);
  set_valid(warp, instr.dest(0), mask, result.valid);
  return Step::kNext;
}

// Instr::imm is the value of true, instr.dest(0).bytes its width.
template <class T>
Step set(Warp& warp, const Instr& instr, LaneMask mask) {
  const Comparison what = Comparison::unpack(instr.variant);
  PredicateLanes result = comparison_result<T>(warp, instr, what);
  if (what.op != BoolOp::kNone)
    result = combine(what.op, result, predicate_lanes(warp, instr.source(2)));
  return instr.dest(0).bytes == 2 ? write_set(warp, instr, mask, result, uint16_t(instr.imm))
                                  : write_set(warp, instr, mask, result, uint32_t(instr.imm));
}

// The low half of imm is the value of true of one half.
template <class Lanes>
Step set_pairs(Warp& warp, const Instr& instr, LaneMask mask) {
  const Comparison what = Comparison::unpack(instr.variant);
  LaneMask tests[2];
  compare_pairs<Lanes>(warp, instr, what, tests);
  LaneMask valid = valid_lanes(warp, instr.source(0)) & valid_lanes(warp, instr.source(1));
  if (what.op != BoolOp::kNone) {
    const PredicateLanes other = predicate_lanes(warp, instr.source(2));
    valid &= other.valid;
    for (LaneMask& test : tests) test = combine(what.op, {test, kFullMask}, other).value;
  }
  uint32_t out[kLanes];
  const auto true_value = uint32_t(instr.imm);
  for (int lane = 0; lane < kLanes; ++lane) {
    out[lane] =
        ((tests[0] >> lane & 1) ? true_value : 0) | ((tests[1] >> lane & 1) ? true_value << 16 : 0);
  }
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  set_valid(warp, instr.dest(0), mask, valid);
  return Step::kNext;
}

bool is_pair(Type type) { return type == Type::kF16x2 || type == Type::kBF16x2; }

Compare take_compare(Decoding& d) {
  constexpr const char* kNames[] = {".eq",  ".ne",  ".lt",  ".le",  ".gt",  ".ge",  ".equ",
                                    ".neu", ".ltu", ".leu", ".gtu", ".geu", ".num", ".nan"};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (d.take(kNames[i])) return Compare(i);
  }
  // Of unsigned integers: lower, lower or same, higher, higher or same.
  if (d.take(".lo")) return Compare::kLt;
  if (d.take(".ls")) return Compare::kLe;
  if (d.take(".hi")) return Compare::kGt;
  if (d.take(".hs")) return Compare::kGe;
  refuse_malformed(d, "a comparison is missing");
}

Comparison take_comparison(Decoding& d) {
  Comparison what;
  what.compare = take_compare(d);
  what.op = take_bool_op(d);
  what.ftz = d.take(".ftz");
  return what;
}

// kHandler<T> of the element that `type` compares.
template <class Fn>
Handler with_element(Decoding& d, Type type, Comparison what, Fn fn) {
  if (!is_float(type) && what.compare > Compare::kGe)
    refuse_malformed(d, "this comparison is for floats");
  switch (type) {
    case Type::kB16:
    case Type::kU16: return fn(uint16_t{});
    case Type::kS16: return fn(int16_t{});
    case Type::kB32:
    case Type::kU32: return fn(uint32_t{});
    case Type::kS32: return fn(int32_t{});
    case Type::kB64:
    case Type::kU64: return fn(uint64_t{});
    case Type::kS64: return fn(int64_t{});
    case Type::kF32: return fn(float{});
    case Type::kF64: return fn(double{});
    case Type::kF16: return fn(F16Element{});
    case Type::kBF16: return fn(BF16Element{});
    default: refuse(d, std::string("comparison of ") + name_of(type));
  }
}

void decode_setp(Decoding& d) {
  Comparison what = take_comparison(d);
  const Type type = d.need_type();
  what.second = d.has_second_predicate();
  d.dest(Type::kPred);
  if (what.second) d.dest(Type::kPred);
  if (is_pair(type) && !what.second) refuse_malformed(d, "setp of a pair has two destinations p|q");
  d.source(type);
  d.source(type);
  if (what.op != BoolOp::kNone) d.source(Type::kPred);
  Handler handler;
  if (is_pair(type)) {
    handler = type == Type::kF16x2 ? setp_pairs<F16Lanes> : setp_pairs<BF16Lanes>;
  } else {
    handler = with_element(d, type, what, []<class T>(T) -> Handler { return setp<T>; });
  }
  d.handler(handler, InstrClass::kPredicate, kOwnValidity);
  d.instr().variant = what.pack();
}

// What set writes for true.
int64_t true_value(Decoding& d, Type type) {
  switch (type) {
    case Type::kU16:
    case Type::kS16:
    case Type::kU32:
    case Type::kS32: return -1;
    case Type::kF32: return 0x3f800000;
    case Type::kF16:
    case Type::kF16x2: return 0x3c00;
    case Type::kBF16:
    case Type::kBF16x2: return 0x3f80;
    default: refuse(d, std::string("set to ") + name_of(type));
  }
}

void decode_set(Decoding& d) {
  const Comparison what = take_comparison(d);
  const Type dest = d.need_type(), type = d.need_type();
  const int64_t value = true_value(d, dest);
  d.dest(dest);
  d.source(type);
  d.source(type);
  if (what.op != BoolOp::kNone) d.source(Type::kPred);
  Handler handler;
  if (is_pair(type)) {
    handler = type == Type::kF16x2 ? set_pairs<F16Lanes> : set_pairs<BF16Lanes>;
  } else {
    handler = with_element(d, type, what, []<class T>(T) -> Handler { return set<T>; });
  }
  d.handler(handler, InstrClass::kPredicate, kOwnValidity);
  d.instr().variant = what.pack();
  // A pair into one 32-bit integer: all ones in each half.
  d.instr().imm = is_pair(type) ? value & 0xffff : value;
}

constexpr Opcode kOpcodes[] = {{"setp", decode_setp}, {"set", decode_set}};

}  // namespace

const OpcodeFamily kPredicateFamily = {"predicate", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
