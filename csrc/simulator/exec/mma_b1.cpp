// mma.sync of single bits: the sum of set bits of A xor B, or A and B.
#include <bit>

#include "simulator/exec/arithmetic.h"
#include "simulator/exec/mma.h"
#include "simulator/exec/mma_fragments.h"

namespace fused_peft::sim {
namespace {

template <int kRows, int kChunks, bool kXor>
Step mma_b1(Warp& warp, const Instr& instr, LaneMask mask) {
  constexpr MmaOperands kOperands{kChunks * kRows / 8, kChunks, kRows / 4};
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  alignas(64) uint32_t d[kOperands.num_c][kLanes];
  for (int i = 0; i < kOperands.num_c; ++i) {
    const auto* c = lanes_of<uint32_t>(warp, kOperands.c(instr, i));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
      uint32_t sum = c[lane];
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int register_a = chunk * (kRows / 8) + i / 2;
        const uint32_t* a = lanes_of<uint32_t>(warp, kOperands.a(instr, register_a)) + 4 * row;
        const uint32_t* b = lanes_of<uint32_t>(warp, kOperands.b(instr, chunk)) + 4 * column;
        for (int k = 0; k < 4; ++k)
          sum += uint32_t(std::popcount(kXor ? a[k] ^ b[k] : a[k] & b[k]));
      }
      d[i][lane] = sum;
    }
  }
  propagate_mma_validity(warp, instr, mask, kOperands, kRows, false);
  for (int i = 0; i < kOperands.num_c; ++i) store_register(warp, instr.dest(i), d[i], mask);
  return Step::kNext;
}

template <int kRows, int kChunks>
Handler of_operation(bool is_xor) {
  return is_xor ? mma_b1<kRows, kChunks, true> : mma_b1<kRows, kChunks, false>;
}

}  // namespace

void decode_mma_b1(Decoding& d, const MmaForm& form) {
  const std::string_view operation = d.take_one({".xor", ".and"});
  if (operation.empty() || !d.take(".popc"))
    refuse_malformed(d, "mma of bits needs .xor.popc or .and.popc");
  if (!d.take(".s32") || !d.take(".b1") || !d.take(".b1") || !d.take(".s32")) {
    refuse_malformed(d, "the types are .s32.b1.b1.s32");
  }
  const bool is_xor = operation == ".xor";
  Handler handler = nullptr;
  if (form.m == 8 && form.k == 128) handler = of_operation<8, 1>(is_xor);
  if (form.m == 16 && form.k == 128) handler = of_operation<16, 1>(is_xor);
  if (form.m == 16 && form.k == 256) handler = of_operation<16, 2>(is_xor);
  if (handler == nullptr || form.satfinite) refuse(d, "this form of .b1");
  const int chunks = form.k / 128;
  take_mma_operands(d, Type::kS32, form.m / 4, Type::kB32, chunks * form.m / 8, chunks);
  d.handler(handler, InstrClass::kTensor, kOwnValidity);
}

}  // namespace fused_peft::sim
