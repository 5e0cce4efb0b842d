// atom and red (PTX ISA 9.7.13). Lanes go one after another, in their order.
#include <cstring>
#include <mutex>

#include "simulator/exec/atomic_ops.h"
#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {

namespace {

using namespace atomic_ops;

template <class T, class Op>
T exchange_alone(std::byte* at, T b, T c, bool* changed) {
  T old;
  std::memcpy(&old, at, sizeof old);
  const T result = Op::apply(old, b, c);
  if (!(result == old)) *changed = true;
  std::memcpy(at, &result, sizeof result);
  return old;
}

// The same where other worker threads may be at the word.
template <class T, class Op>
T exchange_shared(std::byte* at, T b, T c, bool* changed) {
  if constexpr (sizeof(T) == 16) {
    static std::mutex mutex;
    std::lock_guard hold(mutex);
    return exchange_alone<T, Op>(at, b, c, changed);
  } else {
    T* word = reinterpret_cast<T*>(at);
    T old = __atomic_load_n(word, __ATOMIC_RELAXED);
    T result = Op::apply(old, b, c);
    while (!__atomic_compare_exchange_n(word, &old, result, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
      result = Op::apply(old, b, c);
    }
    if (result != old) *changed = true;
    return old;
  }
}

// variant: 1 where the instruction has a third source (cas).
template <class T, class Op>
Step atomic(Warp& warp, const Instr& instr, LaneMask mask) {
  const MemoryForm& form = form_of(instr);
  const Operand& base = instr.source(0);
  Launch& launch = *warp.cta->launch;
  Checker& checker = *launch.checker;
  const int vector = static_cast<int>(form.vector);
  const bool has_third = instr.variant != 0;
  uint64_t address[kLanes];
  lane_addresses(warp, base, instr.imm, address);
  check_address(warp, instr, base, mask);
  LaneMask stored = valid_guard(warp, instr);
  for (int i = 1; i < instr.num_sources; ++i) stored &= valid_lanes(warp, instr.source(i));
  LaneMask valid = 0;
  bool changed = false;
  for_spaces(form.space, address, mask, [&](Space space, LaneMask lanes) {
    LaneMask filled = 0;
    const Access access{space, AccessKind::kAtomic, form.bytes(), lanes, address, true};
    const LaneMask good = checker.access(warp, instr, access, stored, &filled);
    valid |= filled;
    const bool alone = launch.options.threads <= 1 || space != Space::kGlobal;
    // What is released is there before the word changes, what is acquired is read behind it.
    for (LaneMask left = good; left != 0; left &= left - 1) {
      checker.release_at(warp, space, address[std::countr_zero(left)], form.scope, form.release);
    }
    for (LaneMask left = good; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      std::byte* at = Checker::resolve(warp, space, address[lane], lane);
      for (int i = 0; i < vector; ++i) {
        const T b = lanes_of<T>(warp, instr.source(1 + i))[lane];
        const T c = has_third ? lanes_of<T>(warp, instr.source(1 + vector + i))[lane] : b;
        std::byte* word = at + static_cast<size_t>(i) * sizeof(T);
        const T old = alone ? exchange_alone<T, Op>(word, b, c, &changed)
                            : exchange_shared<T, Op>(word, b, c, &changed);
        if (instr.num_dests > 0) dest_lanes<T>(warp, instr.dest(i))[lane] = old;
      }
    }
    for (LaneMask left = lanes & ~good; left != 0 && instr.num_dests > 0; left &= left - 1) {
      for (int i = 0; i < vector; ++i)
        dest_lanes<T>(warp, instr.dest(i))[std::countr_zero(left)] = T{};
    }
    for (LaneMask left = good; left != 0; left &= left - 1) {
      checker.acquire_at(warp, space, address[std::countr_zero(left)], form.scope, form.acquire);
    }
  });
  valid &= valid_lanes(warp, base) & valid_guard(warp, instr);
  for (int i = 0; i < instr.num_dests; ++i) set_valid(warp, instr.dest(i), mask, valid);
  if (changed) warp.cta->progressed();
  return Step::kNext;
}

struct Row {
  std::string_view op;
  Type type;
  Handler handler;  // in global memory, and where nothing depends on the space
  Handler in_shared = nullptr;
};

constexpr Row kRows[] = {
    {".exch", Type::kB32, atomic<uint32_t, Exchange>},
    {".exch", Type::kB64, atomic<uint64_t, Exchange>},
    {".exch", Type::kB128, atomic<Bits128, Exchange>},
    {".cas", Type::kB16, atomic<uint16_t, CompareSwap>},
    {".cas", Type::kB32, atomic<uint32_t, CompareSwap>},
    {".cas", Type::kB64, atomic<uint64_t, CompareSwap>},
    {".cas", Type::kB128, atomic<Bits128, CompareSwap>},
    {".and", Type::kB32, atomic<uint32_t, And>},
    {".and", Type::kB64, atomic<uint64_t, And>},
    {".or", Type::kB32, atomic<uint32_t, Or>},
    {".or", Type::kB64, atomic<uint64_t, Or>},
    {".xor", Type::kB32, atomic<uint32_t, Xor>},
    {".xor", Type::kB64, atomic<uint64_t, Xor>},
    {".add", Type::kU32, atomic<uint32_t, Add>},
    {".add", Type::kS32, atomic<uint32_t, Add>},
    {".add", Type::kU64, atomic<uint64_t, Add>},
    {".add", Type::kS64, atomic<uint64_t, Add>},
    {".add", Type::kF32, atomic<uint32_t, AddF32<true>>, atomic<uint32_t, AddF32<false>>},
    {".add", Type::kF64, atomic<uint64_t, AddF64>},
    {".add", Type::kF16, atomic<uint16_t, Half<F16Format, HalfOp::kAdd>>},
    {".add", Type::kBF16, atomic<uint16_t, Half<BF16Format, HalfOp::kAdd>>},
    {".add", Type::kF16x2, atomic<uint32_t, HalfPair<F16Format, HalfOp::kAdd>>},
    {".add", Type::kBF16x2, atomic<uint32_t, HalfPair<BF16Format, HalfOp::kAdd>>},
    {".inc", Type::kU32, atomic<uint32_t, Increment>},
    {".dec", Type::kU32, atomic<uint32_t, Decrement>},
    {".min", Type::kU32, atomic<uint32_t, Min<uint32_t>>},
    {".min", Type::kS32, atomic<uint32_t, Min<int32_t>>},
    {".min", Type::kU64, atomic<uint64_t, Min<uint64_t>>},
    {".min", Type::kS64, atomic<uint64_t, Min<int64_t>>},
    {".min", Type::kF16, atomic<uint16_t, Half<F16Format, HalfOp::kMin>>},
    {".min", Type::kBF16, atomic<uint16_t, Half<BF16Format, HalfOp::kMin>>},
    {".min", Type::kF16x2, atomic<uint32_t, HalfPair<F16Format, HalfOp::kMin>>},
    {".min", Type::kBF16x2, atomic<uint32_t, HalfPair<BF16Format, HalfOp::kMin>>},
    {".max", Type::kU32, atomic<uint32_t, Max<uint32_t>>},
    {".max", Type::kS32, atomic<uint32_t, Max<int32_t>>},
    {".max", Type::kU64, atomic<uint64_t, Max<uint64_t>>},
    {".max", Type::kS64, atomic<uint64_t, Max<int64_t>>},
    {".max", Type::kF16, atomic<uint16_t, Half<F16Format, HalfOp::kMax>>},
    {".max", Type::kBF16, atomic<uint16_t, Half<BF16Format, HalfOp::kMax>>},
    {".max", Type::kF16x2, atomic<uint32_t, HalfPair<F16Format, HalfOp::kMax>>},
    {".max", Type::kBF16x2, atomic<uint32_t, HalfPair<BF16Format, HalfOp::kMax>>},
};

// A generic address of a float is flushed or not by where it points.
Step atomic_add_f32(Warp& warp, const Instr& instr, LaneMask mask) {
  uint64_t address[kLanes];
  lane_addresses(warp, instr.source(0), instr.imm, address);
  LaneMask shared = 0;
  for_spaces(Space::kGeneric, address, mask, [&](Space space, LaneMask lanes) {
    if (space == Space::kShared) shared |= lanes;
  });
  if (shared != 0) atomic<uint32_t, AddF32<false>>(warp, instr, shared);
  if ((mask & ~shared) != 0) atomic<uint32_t, AddF32<true>>(warp, instr, mask & ~shared);
  return Step::kNext;
}

const Row* find_row(std::string_view op, Type type) {
  for (const Row& row : kRows) {
    if (row.op == op && row.type == type) return &row;
  }
  return nullptr;
}

void source_values(Decoding& d, Type type, uint32_t vector) {
  if (vector > 1) d.open_vector();
  for (uint32_t i = 0; i < vector; ++i) d.source(type);
  if (vector > 1) d.close_vector();
}

void decode_atomic(Decoding& d) {
  if (d.has(".async")) return decode_as(d, "red.async");
  const bool returns = d.opcode() == "atom";
  MemoryForm form;
  form.scope = Scope::kDevice;
  take_order(d, form);
  form.relaxed = true;
  form.space = take_space(d);
  const std::string_view op =
      d.take_one({".and", ".or", ".xor", ".cas", ".exch", ".add", ".inc", ".dec", ".min", ".max"});
  d.take(".noftz");
  const bool policy = d.take(".L2::cache_hint");
  form.vector = take_vector(d);
  const Type type = d.need_type();
  const Row* row = find_row(op, type);
  if (row == nullptr) d.unsupported("atomic operation of this type");
  form.element = static_cast<uint32_t>(bytes_of(type));
  if (returns) {
    if (form.vector > 1) d.open_vector();
    for (uint32_t i = 0; i < form.vector; ++i) d.dest(type);
    if (form.vector > 1) d.close_vector();
  }
  d.address();
  source_values(d, type, form.vector);
  if (op == ".cas") source_values(d, type, form.vector);
  d.instr().variant = op == ".cas" ? 1 : 0;
  if (policy) d.source(Type::kB64);
  Handler handler = row->handler;
  if (row->in_shared != nullptr && form.space == Space::kShared) handler = row->in_shared;
  if (row->in_shared != nullptr && form.space == Space::kGeneric) handler = atomic_add_f32;
  d.handler(handler, InstrClass::kAtomic, kOwnValidity);
  d.keep(std::make_shared<MemoryForm>(form));
}

constexpr Opcode kOpcodes[] = {{"atom", decode_atomic}, {"red", decode_atomic}};

}  // namespace

const OpcodeFamily kAtomicFamily{"atomic", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
