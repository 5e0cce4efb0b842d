// What ld, st, atom, red and their kin have in common: address spaces, memory order, lane
// addresses.
#pragma once

#include <bit>

#include "simulator/check/checker.h"
#include "simulator/core/decoder.h"
#include "simulator/core/validity.h"

namespace fused_peft::sim {

// The qualifiers of a memory instruction (PTX ISA 9.7.9), as its handler needs them.
struct MemoryForm {
  Space space = Space::kGeneric;
  uint32_t element = 0;    // bytes
  uint32_t vector = 1;     // elements of a lane
  bool is_signed = false;  // narrow values are sign-extended into wider registers
  bool relaxed = false;    // .relaxed, .acquire, .release, .acq_rel, .volatile, .mmio, and atomics
  bool acquire = false;
  bool release = false;
  Scope scope = Scope::kSystem;

  uint32_t bytes() const { return element * vector; }
};

inline const MemoryForm& form_of(const Instr& instr) {
  return *static_cast<const MemoryForm*>(instr.extra);
}

// Consumes ".global", ".shared::cta" ...; kGeneric where there is none.
Space take_space(Decoding& decoding);
// Consumes .weak, .relaxed, .acquire, .release, .acq_rel, .volatile, .mmio and the scope.
void take_order(Decoding& decoding, MemoryForm& form);
Scope take_scope(Decoding& decoding, Scope otherwise);
// Consumes cache operators, eviction priorities and prefetch sizes: hints that change no result.
// Returns whether a cache policy operand follows (.L2::cache_hint).
bool take_cache_hints(Decoding& decoding);
// Consumes ".v2", ".v4", ".v8": the number of elements.
uint32_t take_vector(Decoding& decoding);

// Hands the instruction to another family's entry in the opcode table ("st.async").
void decode_as(Decoding& decoding, std::string_view name);

// The addresses of all lanes: base register, or constant, plus Instr::imm (or `offset`).
void lane_addresses(const Warp& warp, const Operand& base, int64_t offset, uint64_t* address);

// Lanes whose guard was computed from initialised data.
inline LaneMask valid_guard(const Warp& warp, const Instr& instr) {
  return warp.valid == nullptr || instr.guard_reg == kNoRegister ? kFullMask
                                                                 : warp.valid[instr.guard_reg];
}
// Reports lanes whose address was computed from uninitialised data.
void check_address(Warp& warp, const Instr& instr, const Operand& base, LaneMask mask);

// Lanes that share a space.
struct SpaceGroup {
  Space space;
  LaneMask lanes;
};

// Where a lane's generic address lies; takes the window off it.
inline Space split_generic(uint64_t& address) {
  if (address < kSharedWindow) [[likely]]
    return Space::kGlobal;
  if (address - kSharedWindow < kWindowSize) {
    address -= kSharedWindow;
    return Space::kShared;
  }
  if (address - kLocalWindow < kWindowSize) {
    address -= kLocalWindow;
    return Space::kLocal;
  }
  return Space::kGlobal;  // no buffer is there
}

// Calls act(space, lanes) for each space that the lanes' addresses are in, windows taken off.
// Mostly once.
template <class Act>
inline void for_spaces(Space space, uint64_t* address, LaneMask mask, Act act) {
  if (space != Space::kGeneric) {
    act(space, mask);
    return;
  }
  LaneMask of[3] = {0, 0, 0};
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const Space here = split_generic(address[lane]);
    of[here == Space::kGlobal ? 0 : here == Space::kShared ? 1 : 2] |= LaneMask{1} << lane;
  }
  if (of[0] != 0) act(Space::kGlobal, of[0]);
  if (of[1] != 0) act(Space::kShared, of[1]);
  if (of[2] != 0) act(Space::kLocal, of[2]);
}

// Host addresses of lanes that the checker has let pass.
void host_addresses(Warp& warp, Space space, const uint64_t* address, LaneMask lanes,
                    std::byte** host);

}  // namespace fused_peft::sim
