// Selection and classification: selp slct testp.
#include <iterator>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/logic.h"
#include "simulator/exec/numeric.h"

namespace fused_peft::sim {
namespace {

// ---- selp, slct: a lane is as good as the source it takes

template <class T>
Step select_lanes(Warp& warp, const Instr& instr, LaneMask mask, PredicateLanes first) {
  const T* a = lanes_of<T>(warp, instr.source(0));
  const T* b = lanes_of<T>(warp, instr.source(1));
  alignas(64) T out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    out[lane] = (first.value & kLaneBits[size_t(lane)]) ? a[lane] : b[lane];
  }
  store_lanes(dest_lanes<T>(warp, instr.dest(0)), out, mask);
  const LaneMask valid = (first.value & valid_lanes(warp, instr.source(0))) |
                         (~first.value & valid_lanes(warp, instr.source(1)));
  set_valid(warp, instr.dest(0), mask, valid & first.valid);
  return Step::kNext;
}

template <class T>
Step selp(Warp& warp, const Instr& instr, LaneMask mask) {
  return select_lanes<T>(warp, instr, mask, predicate_lanes(warp, instr.source(2)));
}

// The first source where the third is at least zero (which -0 is, and a NaN is not).
template <class T, class C, bool kFtz>
Step slct(Warp& warp, const Instr& instr, LaneMask mask) {
  const C* c = lanes_of<C>(warp, instr.source(2));
  LaneMask first = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    C value = c[lane];
    if constexpr (kFtz) value = flush(value);
    first |= value >= C(0) ? kLaneBits[size_t(lane)] : 0;
  }
  return select_lanes<T>(warp, instr, mask, {first, valid_lanes(warp, instr.source(2))});
}

void decode_selp(Decoding& d) {
  const Type type = d.need_type();
  take_operands(d, type, 2);
  d.source(Type::kPred);
  d.handler(with_width(d, type, []<class T>(T) -> Handler { return selp<T>; }), InstrClass::kMove,
            kOwnValidity);
}

void decode_slct(Decoding& d) {
  const bool ftz = d.take(".ftz");
  const Type type = d.need_type(), selector = d.need_type();
  if (selector != Type::kS32 && selector != Type::kF32)
    refuse_malformed(d, "slct selects by .s32 or .f32");
  take_operands(d, type, 2);
  d.source(selector);
  const Handler handler = with_width(d, type, [&]<class T>(T) -> Handler {
    if (selector == Type::kS32) return slct<T, int32_t, false>;
    return ftz ? slct<T, float, true> : slct<T, float, false>;
  });
  d.handler(handler, InstrClass::kMove, kOwnValidity);
}

// ---- testp

enum class Test : uint32_t { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };

template <class Format>
bool test_bits(Test test, uint64_t bits) {
  const uint64_t magnitude = bits & ((uint64_t{1} << (Format::kBits - 1)) - 1);
  const uint64_t least_normal = uint64_t{1} << Format::kMantissa;
  switch (test) {
    case Test::kFinite: return magnitude < Format::kInfinity;
    case Test::kInfinite: return magnitude == Format::kInfinity;
    case Test::kNumber: return magnitude <= Format::kInfinity;
    case Test::kNotANumber: return magnitude > Format::kInfinity;
    case Test::kNormal: return magnitude >= least_normal && magnitude < Format::kInfinity;
    case Test::kSubnormal: return magnitude != 0 && magnitude < least_normal;
  }
  return false;
}

template <class Format>
Step testp(Warp& warp, const Instr& instr, LaneMask mask) {
  const auto* source = lanes_of<typename Format::Bits>(warp, instr.source(0));
  LaneMask result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    result |= LaneMask{test_bits<Format>(Test(instr.variant), source[lane])} << lane;
  }
  set_predicate(warp, instr.dest(0), mask, result);
  return Step::kNext;
}

void decode_testp(Decoding& d) {
  constexpr const char* kNames[] = {".finite",     ".infinite", ".number",
                                    ".notanumber", ".normal",   ".subnormal"};
  uint32_t test = 0;
  while (test < std::size(kNames) && !d.take(kNames[test])) ++test;
  if (test == std::size(kNames)) refuse_malformed(d, "a test is missing");
  const Type type = d.need_type();
  if (type != Type::kF32 && type != Type::kF64) refuse_malformed(d, "testp is of .f32 or .f64");
  d.dest(Type::kPred);
  d.source(type);
  d.handler(type == Type::kF64 ? testp<F64Format> : testp<F32Format>, InstrClass::kPredicate);
  d.instr().variant = test;
}

constexpr Opcode kOpcodes[] = {
    {"selp", decode_selp}, {"slct", decode_slct}, {"testp", decode_testp}};

}  // namespace

const OpcodeFamily kSelectFamily = {"select", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
