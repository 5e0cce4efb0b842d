// mma.sync of double precision: m8n8k4 and, of sm_90, m16n8k4, k8 and k16.
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/mma.h"
#include "simulator/exec/mma_fragments.h"

namespace fused_peft::sim {
namespace {

template <int kRows, int kChunks>
Step mma_f64(Warp& warp, const Instr& instr, LaneMask mask) {
  constexpr MmaOperands kOperands{kChunks * kRows / 8, kChunks, kRows / 4};
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  const double* a[kOperands.num_a];
  const double* b[kChunks];
  for (int i = 0; i < kOperands.num_a; ++i) a[i] = lanes_of<double>(warp, kOperands.a(instr, i));
  for (int i = 0; i < kChunks; ++i) b[i] = lanes_of<double>(warp, kOperands.b(instr, i));
  alignas(64) double d[kOperands.num_c][kLanes];
  for (int i = 0; i < kOperands.num_c; ++i) {
    const double* c = lanes_of<double>(warp, kOperands.c(instr, i));
    const int half = i / 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
      double sum = c[lane];
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const double* row_a = a[chunk * (kRows / 8) + half] + 4 * row;
        const double* column_b = b[chunk] + 4 * column;
        for (int k = 0; k < 4; ++k) sum = std::fma(row_a[k], column_b[k], sum);
      }
      d[i][lane] = sum;
    }
  }
  propagate_mma_validity(warp, instr, mask, kOperands, kRows, false);
  for (int i = 0; i < kOperands.num_c; ++i) store_register(warp, instr.dest(i), d[i], mask);
  return Step::kNext;
}

}  // namespace

void decode_mma_f64(Decoding& d, const MmaForm& form) {
  for (int i = 0; i < 4; ++i) {
    if (!d.take(".f64")) refuse_malformed(d, "all four types must be .f64");
  }
  const int chunks = form.k / 4;
  Handler handler = nullptr;
  if (form.m == 8 && chunks == 1) handler = mma_f64<8, 1>;
  if (form.m == 16 && chunks == 1) handler = mma_f64<16, 1>;
  if (form.m == 16 && chunks == 2) handler = mma_f64<16, 2>;
  if (form.m == 16 && chunks == 4) handler = mma_f64<16, 4>;
  if (handler == nullptr || form.satfinite) refuse(d, "this form of .f64");
  take_mma_operands(d, Type::kF64, form.m / 4, Type::kF64, chunks * form.m / 8, chunks);
  d.handler(handler, InstrClass::kTensor, kOwnValidity);
}

}  // namespace fused_peft::sim
