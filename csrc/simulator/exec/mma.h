// mma.sync in parts, by the type of its elements.
#pragma once

#include "simulator/core/decoder.h"

namespace fused_peft::sim {

// The shape, and types where they are PTX fundamental ones.
struct MmaForm {
  int m = 0, n = 0, k = 0;
  bool satfinite = false;
};

// Registers of D, A, B and C: one 32- or 64-bit register each.
void take_mma_operands(Decoding& d, Type type_d, int num_d, Type type_ab, int num_a, int num_b);
// Lanes are missing at an .aligned instruction. True while they may still come (ptxas makes the
// warp converge there): Step::kBlock is due. Once nothing else can run it is a finding, and false.
bool waits_for_lanes(Warp& warp, const Instr& instr, LaneMask mask);

void decode_mma_f64(Decoding& d, const MmaForm& form);  // mma_f64.cpp
void decode_mma_b1(Decoding& d, const MmaForm& form);   // mma_b1.cpp

}  // namespace fused_peft::sim
