// A kernel, decoded: instructions with their handlers and operands, constants, what a thread and a
// CTA need.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "simulator/core/types.h"

namespace fused_peft::sim {

class Warp;
struct Instr;

// What the warp does after a handler has returned.
enum class Step : uint8_t {
  kNext,   // go on with the instruction behind
  kJump,   // the handler has set the warp's pc (and may have split it)
  kYield,  // go on with the instruction behind, but let other warps run first (a failed try_wait,
           // nanosleep)
  kBlock,  // the instruction is not done: run it again later. warp.waits_for says for what
};

// Executes the instruction for the lanes in `mask` (active and guarded; never empty, unless the
// instruction is kRunsMasked). Handlers of one warp never run at the same time as another's of the
// same CTA.
using Handler = Step (*)(Warp& warp, const Instr& instr, LaneMask mask);

constexpr uint32_t kNoRegister = 0xffffffffu;

// A register or a constant. A register's 32 lanes lie side by side at bases[0] + offset in the
// warp's frame, in elements of `bytes` (16-bit for .b8 registers too); a predicate is one LaneMask.
// A constant lies in the program's pool at bases[1] + offset, broadcast to 32 lanes in the type the
// instruction reads.
struct Operand {
  uint32_t offset = 0;
  uint32_t reg = kNoRegister;  // index into Warp::valid; kNoRegister for a constant or the sink "_"
  uint8_t space = 0;           // 0 the frame, 1 the constants
  uint8_t bytes = 0;           // of one lane; 0 for a predicate
  bool negated = false;        // a predicate operand "!%p"
  bool sink = false;  // the operand "_": writes vanish (it has a scratch slot in the frame)
};

// For counting; an instruction belongs to one.
enum class InstrClass : uint8_t {
  kInteger,
  kFloat,
  kHalf,
  kConvert,
  kMove,
  kPredicate,
  kBranch,
  kLoad,
  kStore,
  kAtomic,
  kSharedLoad,
  kSharedStore,
  kMatrixLoad,
  kTensor,
  kAsyncCopy,
  kBarrier,
  kFence,
  kWarp,
  kMath,
  kOther,
  kCount
};
const char* name_of(InstrClass kind);

enum InstrFlags : uint8_t {
  kRunsMasked = 1,   // the handler runs even when no lane is left (bar, bra: convergence is theirs)
  kOwnValidity = 2,  // the handler keeps Warp::valid of its destinations itself (loads, shfl, mma)
};

struct Instr {
  Handler run = nullptr;
  const Operand* operands = nullptr;  // destinations first, then sources
  uint16_t num_dests = 0;
  uint16_t num_sources = 0;
  InstrClass kind = InstrClass::kOther;
  uint8_t flags = 0;
  bool guard_negated = false;
  uint32_t guard = kNoRegister;  // frame offset of the guard predicate's LaneMask
  uint32_t guard_reg = kNoRegister;
  uint32_t target = 0;          // branch target, an index into Program::code
  uint32_t index = 0;           // of this instruction itself in Program::code
  uint32_t variant = 0;         // handler-defined bits (a qualifier's number)
  int64_t imm = 0;              // address offset, or handler-defined
  const void* extra = nullptr;  // handler-defined, owned by Program::extras

  const Operand& dest(int i) const { return operands[i]; }
  const Operand& source(int i) const { return operands[num_dests + i]; }
};

// Where an instruction came from. file is an index into Program::files; line 0: not known (no
// -lineinfo).
struct SourceLine {
  uint32_t ptx_line = 0;
  uint32_t file = 0;
  uint32_t line = 0;
  // Where an inlined function's line was called from: the outermost call, in the kernel's own text.
  // Else 0.
  uint32_t caller_file = 0;
  uint32_t caller_line = 0;
};

struct KernelParam {
  std::string name;
  uint32_t offset = 0;  // in the parameter buffer
  uint32_t bytes = 0;
};

// A special register that is fixed for a thread's life: filled into its frame slot when the warp
// starts.
struct SpecialSlot {
  std::string name;  // "%tid.x"
  Operand slot;
};

// Constants are read as vectors, and a kernel's parameters may hold tensor maps: both start at a
// cache line.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* pointer, std::size_t) { ::operator delete(pointer, std::align_val_t{64}); }
  bool operator==(const CacheLineAllocator&) const { return true; }
};

using AlignedBytes = std::vector<std::byte, CacheLineAllocator<std::byte>>;

struct Program {
  std::string name;  // mangled
  std::vector<Instr> code;
  std::vector<SourceLine> lines;   // of each instruction
  std::vector<std::string> texts;  // of each instruction, as in the PTX, for findings and errors
  std::vector<std::string> files;
  std::deque<std::vector<Operand>> operand_pool;  // stable addresses
  AlignedBytes constants;
  std::vector<SpecialSlot> specials;
  std::vector<std::shared_ptr<const void>> extras;
  std::map<std::string, uint32_t>
      register_names;  // of findings: "%r12" -> register (the entry function's own)

  uint32_t frame_bytes = 0;  // of one warp's registers
  uint32_t num_registers = 0;
  uint32_t local_bytes =
      0;  // .local variables of one thread (each at its offset), inlined calls included
  uint32_t private_bytes =
      0;  // parameters of device functions, of one thread; not counted as local traffic
  uint32_t static_shared_bytes = 0;  // from kSharedStart on
  uint32_t dynamic_shared_align = 16;
  uint32_t dynamic_shared_offset = 0;  // where extern shared starts, kSharedStart included
  std::vector<KernelParam> params;
  uint32_t param_bytes = 0;
  // .maxntid, .reqntid, .minnctapersm, .maxnreg, .reqnctapercluster, .explicitcluster; 0 where
  // absent
  uint32_t max_threads[3] = {0, 0, 0};
  uint32_t required_threads[3] = {0, 0, 0};
  uint32_t required_cluster[3] = {0, 0, 0};
  bool explicit_cluster = false;
  uint32_t max_registers = 0;
  uint32_t target_sm = 0;             // 80, 90
  bool target_arch_specific = false;  // sm_90a
};

// A PTX module: its kernels, decoded when first asked for, and its global and constant variables,
// which live in memory of the module's own at fixed addresses.
struct GlobalVariable {
  std::string name;
  std::byte* address = nullptr;
  uint64_t bytes = 0;
  bool constant = false;
};

}  // namespace fused_peft::sim
