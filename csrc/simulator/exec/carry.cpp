// Extended-precision arithmetic: add.cc addc sub.cc subc mad.cc madc.
#include <iterator>
#include <type_traits>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

// Instr::variant of the handlers.
enum CarryFlags : uint32_t { kCarryIn = 1, kCarryOut = 2, kHigh = 4, kSigned = 8 };

// a + b + carry, carry out of it.
template <class T>
T add_with_carry(T a, T b, bool carry_in, bool* carry_out) {
  T sum;
  const bool first = __builtin_add_overflow(a, b, &sum);
  const bool second = __builtin_add_overflow(sum, T(carry_in), &sum);
  *carry_out = first || second;
  return sum;
}

template <class T>
T product(T a, T b, uint32_t flags) {
  if (!(flags & kHigh)) return a * b;
  using Wide = std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>;
  using SignedWide = std::conditional_t<sizeof(T) == 4, int64_t, __int128>;
  using Signed = std::make_signed_t<T>;
  constexpr unsigned kWidth = 8 * sizeof(T);
  return (flags & kSigned) ? T((SignedWide(Signed(a)) * Signed(b)) >> kWidth)
                           : T((Wide(a) * b) >> kWidth);
}

// Destinations: the result, then CC where it is written. Sources: a, b, (c), then CC where it is
// read.
template <class T, Arithmetic kOp>
Step with_carry(Warp& warp, const Instr& instr, LaneMask mask) {
  constexpr int kOperands = kOp == Arithmetic::kMad ? 3 : 2;
  const T* sources[kOperands];
  for (int i = 0; i < kOperands; ++i) sources[i] = lanes_of<T>(warp, instr.source(i));
  const uint32_t flags = instr.variant;
  const LaneMask carry = (flags & kCarryIn) ? predicate(warp, instr.source(kOperands)) : 0;
  alignas(64) T out[kLanes];
  LaneMask carries = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool in = carry >> lane & 1;
    bool carry_out = false;
    if constexpr (kOp == Arithmetic::kAdd) {
      out[lane] = add_with_carry(sources[0][lane], sources[1][lane], in, &carry_out);
    } else if constexpr (kOp == Arithmetic::kSub) {
      // CC holds a borrow between subtractions.
      const T b = sources[1][lane];
      T difference;
      const bool first = __builtin_sub_overflow(sources[0][lane], b, &difference);
      const bool second = __builtin_sub_overflow(difference, T(in), &difference);
      out[lane] = difference;
      carry_out = first || second;
    } else {
      const T low = product(sources[0][lane], sources[1][lane], flags);
      out[lane] = add_with_carry(low, sources[kOperands - 1][lane], in, &carry_out);
    }
    carries |= LaneMask{carry_out} << lane;
  }
  store_lanes(dest_lanes<T>(warp, instr.dest(0)), out, mask);
  if (flags & kCarryOut) set_predicate(warp, instr.dest(1), mask, carries);
  return Step::kNext;
}

template <Arithmetic kOp>
Handler handler_of(Type type) {
  return bytes_of(type) == 4 ? with_carry<uint32_t, kOp> : with_carry<uint64_t, kOp>;
}

template <Arithmetic kOp>
void decode_with_carry_in(Decoding& d) {
  decode_carry_arithmetic(d, kOp, true);
}

constexpr Opcode kOpcodes[] = {{"addc", decode_with_carry_in<Arithmetic::kAdd>},
                               {"subc", decode_with_carry_in<Arithmetic::kSub>},
                               {"madc", decode_with_carry_in<Arithmetic::kMad>}};

}  // namespace

const OpcodeFamily kCarryFamily = {"carry", kOpcodes, std::size(kOpcodes)};

void decode_carry_arithmetic(Decoding& d, Arithmetic op, bool carry_in) {
  uint32_t flags = carry_in ? uint32_t{kCarryIn} : uint32_t{kCarryOut};
  if (d.take(".cc")) flags |= kCarryOut;
  if (op == Arithmetic::kMad) {
    const std::string_view part = d.take_one({".lo", ".hi"});
    if (part.empty()) refuse_malformed(d, "mad with carry needs .lo or .hi");
    if (part == ".hi") flags |= kHigh;
  }
  const Type type = d.need_type();
  const bool wide_enough = bytes_of(type) == 4 || bytes_of(type) == 8;
  if (!wide_enough || is_float(type))
    refuse_malformed(d, "arithmetic with carry is of 32 and 64 bits");
  if (is_signed(type)) flags |= kSigned;
  d.dest(type);
  if (flags & kCarryOut) d.carry_dest();
  for (int i = 0; i < (op == Arithmetic::kMad ? 3 : 2); ++i) d.source(type);
  if (flags & kCarryIn) d.carry_source();
  switch (op) {
    case Arithmetic::kAdd:
      d.handler(handler_of<Arithmetic::kAdd>(type), InstrClass::kInteger);
      break;
    case Arithmetic::kSub:
      d.handler(handler_of<Arithmetic::kSub>(type), InstrClass::kInteger);
      break;
    case Arithmetic::kMad:
      d.handler(handler_of<Arithmetic::kMad>(type), InstrClass::kInteger);
      break;
    default: refuse_malformed(d, ".cc is for add, sub and mad");
  }
  d.instr().variant = flags;
}

}  // namespace fused_peft::sim
