// wgmma in parts: wgmma.cpp takes the instruction apart and computes, wgmma_order.cpp says when.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <vector>

#include "simulator/core/cta.h"
#include "simulator/core/decoder.h"

namespace fused_peft::sim {

// An operation that a warp has issued: its 16 rows of D, those of A, all of B.
struct WgmmaOperation {
  const Instr* instr = nullptr;
  uint64_t a = 0, b = 0;     // descriptors (a: unless A is in registers)
  bool accumulates = false;  // scale-d
  LaneMask valid = 0;        // lanes whose descriptors and scale-d were initialised
  uint64_t sequence = 0;     // counts the warp's operations; the same for all warps of a warpgroup
};

// What does not change between executions: Instr::extra.
struct WgmmaForm {
  void (*execute)(Warp& warp, const WgmmaOperation& operation) = nullptr;
  uint32_t n = 0;
  bool registers_a = false;
  bool transpose_a = false, transpose_b = false;  // MN-major
  bool negate = false;                            // imm-scale-a * imm-scale-b is -1
};

inline const WgmmaForm& wgmma_form(const Instr& instr) {
  return *static_cast<const WgmmaForm*>(instr.extra);
}

// B as the multiplication takes it, read once for the four warps.
struct OperandTile {
  struct alignas(32) Row {
    float column[8];
  };
  uint64_t descriptor = 0;
  std::vector<Row> rows;  // [n / 8][k]
  // By 8 columns: lanes whose columns 2 t, and 2 t + 1, are initialised.
  std::array<std::array<LaneMask, 2>, 32> valid = {};
  int users = 0;
};

// Of one warp. Groups that are committed and not waited for, and operations after the last of them.
struct WgmmaState {
  std::deque<std::vector<WgmmaOperation>> groups;
  std::vector<WgmmaOperation> open;
  // Registers of D that nobody may look at before the wait count as uninitialised; what they
  // counted as before.
  std::vector<std::pair<const Operand*, LaneMask>> hidden;
  uint64_t issued = 0;
  uint64_t fences = 0, waits = 0;  // wgmma.fence and wait_group instructions that it has come to
  std::map<uint64_t, OperandTile>
      tiles;  // of its warpgroup, by sequence; the first warp's are used
};

WgmmaState& wgmma_of(Warp& warp);
// The first warp of the warpgroup.
inline Warp& warpgroup_leader(Warp& warp) { return warp.cta->warps[warp.index & ~3u]; }

// wgmma.mma_async, its operands decoded.
Step issue_wgmma(Warp& warp, const Instr& instr, LaneMask mask);
// wgmma.fence, commit_group, wait_group; false: the instruction is none of these.
bool decode_wgmma_order(Decoding& d);

}  // namespace fused_peft::sim
