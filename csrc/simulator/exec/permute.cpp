// lop3 and prmt.
#include <iterator>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/logic.h"

namespace fused_peft::sim {
namespace {

// A Boolean function of three bits as a polynomial over GF(2) (Zhegalkin): bit i of `coefficients`
// says that the product of the inputs in i (a: 4, b: 2, c: 1) takes part in the sum.
uint32_t polynomial_of(uint32_t table) {
  for (const uint32_t step : {1u, 2u, 4u}) {
    for (uint32_t i = 0; i < 8; ++i) {
      if (i & step) table ^= (table >> (i - step) & 1) << i;
    }
  }
  return table;
}

void lop3_lanes(const Warp& warp, const Instr& instr, uint32_t* out) {
  const auto* a = lanes_of<uint32_t>(warp, instr.source(0));
  const auto* b = lanes_of<uint32_t>(warp, instr.source(1));
  const auto* c = lanes_of<uint32_t>(warp, instr.source(2));
  uint32_t k[8];
  for (int i = 0; i < 8; ++i) k[i] = (instr.variant >> i & 1) ? 0xffffffffu : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t x = a[lane], y = b[lane], z = c[lane], yz = y & z;
    out[lane] = k[0] ^ (k[1] & z) ^ (k[2] & y) ^ (k[3] & yz) ^
                (x & (k[4] ^ (k[5] & z) ^ (k[6] & y) ^ (k[7] & yz)));
  }
}

Step lop3(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) uint32_t out[kLanes];
  lop3_lanes(warp, instr, out);
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

// lop3.and / .or d|p, a, b, c, table, q: p = (d != 0) op q. imm is the BoolOp.
Step lop3_predicate(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) uint32_t out[kLanes];
  lop3_lanes(warp, instr, out);
  LaneMask nonzero = 0;
  for (int lane = 0; lane < kLanes; ++lane) nonzero |= out[lane] != 0 ? kLaneBits[size_t(lane)] : 0;
  LaneMask valid = kFullMask;
  for (int i = 0; i < 3; ++i) valid &= valid_lanes(warp, instr.source(i));
  const PredicateLanes result =
      combine(BoolOp(instr.imm), {nonzero, valid}, predicate_lanes(warp, instr.source(3)));
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  set_valid(warp, instr.dest(0), mask, valid);
  set_predicate(warp, instr.dest(1), mask, result.value);
  set_valid(warp, instr.dest(1), mask, result.valid);
  return Step::kNext;
}

void decode_lop3(Decoding& d) {
  const BoolOp op = take_bool_op(d);
  if (!d.take(".b32")) refuse_malformed(d, "lop3 is of .b32");
  const bool second = d.has_second_predicate();
  if (second != (op != BoolOp::kNone) || op == BoolOp::kXor) {
    refuse_malformed(d, "lop3.and and lop3.or have destinations d|p, lop3 has one");
  }
  d.dest(Type::kB32);
  if (second) d.dest(Type::kPred);
  for (int i = 0; i < 3; ++i) d.source(Type::kB32);
  const int64_t table = d.immediate();
  if (table < 0 || table > 255) refuse_malformed(d, "lop3's table has 8 bits");
  if (second) d.source(Type::kPred);
  d.handler(second ? lop3_predicate : lop3, InstrClass::kInteger, second ? kOwnValidity : 0);
  d.instr().variant = polynomial_of(uint32_t(table));
  d.instr().imm = int64_t(op);
}

// ---- prmt

// Selector nibbles for the modes that look at two bits of c only (PTX ISA, prmt, table of modes).
constexpr uint16_t kModeSelectors[6][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543},  // f4e
    {0x5670, 0x6701, 0x7012, 0x0123},  // b4e
    {0x0000, 0x1111, 0x2222, 0x3333},  // rc8
    {0x3210, 0x3211, 0x3222, 0x3333},  // ecl
    {0x0000, 0x1110, 0x2210, 0x3210},  // ecr
    {0x1010, 0x3232, 0x1010, 0x3232},  // rc16
};

template <bool kMode>
Step prmt(Warp& warp, const Instr& instr, LaneMask mask) {
  const auto* a = lanes_of<uint32_t>(warp, instr.source(0));
  const auto* b = lanes_of<uint32_t>(warp, instr.source(1));
  const auto* c = lanes_of<uint32_t>(warp, instr.source(2));
  alignas(64) uint32_t out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t bytes = uint64_t{b[lane]} << 32 | a[lane];
    const uint32_t selector = kMode ? kModeSelectors[instr.variant][c[lane] & 3] : c[lane];
    uint64_t result = 0;
    for (unsigned i = 0; i < 4; ++i) {
      const uint64_t nibble = selector >> (4 * i);
      const uint64_t byte = bytes >> (8 * (nibble & 7)) & 0xff;
      const uint64_t sign = (byte >> 7) * 0xff;  // nibble 8 and above: the byte's sign, eight times
      result |= ((nibble & 8) ? sign : byte) << (8 * i);
    }
    out[lane] = uint32_t(result);
  }
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  return Step::kNext;
}

void decode_prmt(Decoding& d) {
  constexpr const char* kNames[] = {".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"};
  if (!d.take(".b32")) refuse_malformed(d, "prmt is of .b32");
  uint32_t mode = 0;
  while (mode < std::size(kNames) && !d.take(kNames[mode])) ++mode;
  take_operands(d, Type::kB32, 3);
  d.handler(mode < std::size(kNames) ? prmt<true> : prmt<false>, InstrClass::kInteger);
  d.instr().variant = mode;
}

constexpr Opcode kOpcodes[] = {{"lop3", decode_lop3}, {"prmt", decode_prmt}};

}  // namespace

const OpcodeFamily kPermuteFamily = {"permute", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
