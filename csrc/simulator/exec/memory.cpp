// ld, ldu, st and cache control (PTX ISA 9.7.9).
#include <cstring>

#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {

namespace {

struct Bytes16 {
  uint64_t low, high;
};

template <uint32_t kBytes>
using Raw = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<kBytes == 2, uint16_t,
                       std::conditional_t<kBytes == 4, uint32_t,
                                          std::conditional_t<kBytes == 8, uint64_t, Bytes16>>>>;

// Elements at `host` + offset into a register, zero- or sign-extended to its width.
template <class From, class To>
void load_register(Warp& warp, const Operand& dest, std::byte* const* host, uint32_t offset,
                   LaneMask lanes) {
  To* to = dest_lanes<To>(warp, dest);
  if (lanes == kFullMask) {
    for (int lane = 0; lane < kLanes; ++lane) {
      From value;
      std::memcpy(&value, host[lane] + offset, sizeof value);
      to[lane] = static_cast<To>(value);
    }
    return;
  }
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    From value;
    std::memcpy(&value, host[lane] + offset, sizeof value);
    to[lane] = static_cast<To>(value);
  }
}

template <uint32_t kBytes>
void load_element(Warp& warp, const Operand& dest, bool is_signed, std::byte* const* host,
                  uint32_t offset, LaneMask lanes) {
  using U = Raw<kBytes>;
  if (dest.bytes == kBytes || kBytes == 16) {
    load_register<U, U>(warp, dest, host, offset, lanes);
    return;
  }
  if constexpr (kBytes < 8) {
    using S = std::make_signed_t<U>;
    switch (dest.bytes) {
      case 2:
        is_signed ? load_register<S, int16_t>(warp, dest, host, offset, lanes)
                  : load_register<U, uint16_t>(warp, dest, host, offset, lanes);
        return;
      case 4:
        is_signed ? load_register<S, int32_t>(warp, dest, host, offset, lanes)
                  : load_register<U, uint32_t>(warp, dest, host, offset, lanes);
        return;
      default:
        is_signed ? load_register<S, int64_t>(warp, dest, host, offset, lanes)
                  : load_register<U, uint64_t>(warp, dest, host, offset, lanes);
        return;
    }
  }
}

void zero_register(Warp& warp, const Operand& dest, LaneMask lanes) {
  std::byte* to = dest_lanes<std::byte>(warp, dest);
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    std::memset(to + std::countr_zero(left) * dest.bytes, 0, dest.bytes);
  }
}

// Calls act(lane) for lanes with distinct addresses in a row (a flag is mostly read by all at one
// address).
template <class Act>
void for_words(const uint64_t* address, LaneMask lanes, Act act) {
  uint64_t last = ~uint64_t{0};
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if (address[lane] != last) act(address[lane]);
    last = address[lane];
  }
}

template <uint32_t kBytes>
Step load(Warp& warp, const Instr& instr, LaneMask mask) {
  const MemoryForm& form = form_of(instr);
  const Operand& base = instr.source(0);
  Checker& checker = *warp.cta->launch->checker;
  alignas(64) uint64_t address[kLanes];
  lane_addresses(warp, base, instr.imm, address);
  check_address(warp, instr, base, mask);
  LaneMask valid = 0;
  for_spaces(form.space, address, mask, [&](Space space, LaneMask lanes) {
    LaneMask filled = 0;
    const Access access{space, AccessKind::kRead, form.bytes(), lanes, address, form.relaxed};
    const LaneMask good = checker.access(warp, instr, access, 0, &filled);
    valid |= filled;
    alignas(64) std::byte* host[kLanes];
    host_addresses(warp, space, address, good, host);
    for (uint32_t i = 0; i < form.vector; ++i) {
      const Operand& dest = instr.dest(static_cast<int>(i));
      load_element<kBytes>(warp, dest, form.is_signed, host, i * kBytes, good);
      if (good != lanes) zero_register(warp, dest, lanes & ~good);
    }
    if (form.relaxed) {
      for_words(address, good, [&](uint64_t word) {
        checker.acquire_at(warp, space, word, form.scope, form.acquire);
      });
    }
  });
  valid &= valid_lanes(warp, base) & valid_guard(warp, instr);
  for (uint32_t i = 0; i < form.vector; ++i) {
    set_valid(warp, instr.dest(static_cast<int>(i)), mask, valid);
  }
  return Step::kNext;
}

// ld.param of a kernel's parameter: the same for every lane, known to be there.
template <uint32_t kBytes>
Step load_parameter(Warp& warp, const Instr& instr, LaneMask mask) {
  const MemoryForm& form = form_of(instr);
  const AlignedBytes& params = warp.cta->launch->config.params;
  const uint64_t offset =
      *lanes_of<uint64_t>(warp, instr.source(0)) + static_cast<uint64_t>(instr.imm);
  if (offset >= kCalleeParam || offset + form.bytes() > params.size())
    return load<kBytes>(warp, instr, mask);
  std::byte* host[kLanes];
  for (std::byte*& at : host) at = const_cast<std::byte*>(params.data()) + offset;
  for (uint32_t i = 0; i < form.vector; ++i) {
    const Operand& dest = instr.dest(static_cast<int>(i));
    load_element<kBytes>(warp, dest, form.is_signed, host, i * kBytes, mask);
    set_valid(warp, dest, mask, valid_guard(warp, instr));
  }
  return Step::kNext;
}

template <uint32_t kBytes, uint32_t kWidth>
void gather_from(const std::byte* from, std::byte* to, uint32_t stride) {
  for (int lane = 0; lane < kLanes; ++lane) {
    std::memcpy(to + lane * stride, from + lane * kWidth, std::min(kBytes, kWidth));
  }
}

// A register's lanes, narrowed to elements of kBytes, into values of the lanes `stride` bytes
// apart.
template <uint32_t kBytes>
void gather(const Warp& warp, const Operand& source, std::byte* to, uint32_t stride) {
  const std::byte* from = lanes_of<std::byte>(warp, source);
  switch (source.bytes) {
    case 2: return gather_from<kBytes, 2>(from, to, stride);
    case 4: return gather_from<kBytes, 4>(from, to, stride);
    case 8: return gather_from<kBytes, 8>(from, to, stride);
    default: return gather_from<kBytes, 16>(from, to, stride);
  }
}

template <uint32_t kSize>
void scatter(const std::byte* data, std::byte* const* host, LaneMask lanes) {
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    std::memcpy(host[lane], data + lane * kSize, kSize);
  }
}

void scatter_lanes(const std::byte* data, std::byte* const* host, LaneMask lanes, uint32_t bytes) {
  switch (bytes) {
    case 1: return scatter<1>(data, host, lanes);
    case 2: return scatter<2>(data, host, lanes);
    case 4: return scatter<4>(data, host, lanes);
    case 8: return scatter<8>(data, host, lanes);
    case 16: return scatter<16>(data, host, lanes);
    default: return scatter<32>(data, host, lanes);
  }
}

template <uint32_t kBytes>
Step store(Warp& warp, const Instr& instr, LaneMask mask) {
  const MemoryForm& form = form_of(instr);
  const Operand& base = instr.source(0);
  Checker& checker = *warp.cta->launch->checker;
  alignas(64) uint64_t address[kLanes];
  lane_addresses(warp, base, instr.imm, address);
  check_address(warp, instr, base, mask);
  const uint32_t bytes = form.bytes();
  alignas(64) std::byte data[kLanes * 32];
  LaneMask stored = valid_guard(warp, instr);
  for (uint32_t i = 0; i < form.vector; ++i) {
    const Operand& value = instr.source(static_cast<int>(1 + i));
    gather<kBytes>(warp, value, data + i * kBytes, bytes);
    stored &= valid_lanes(warp, value);
  }
  for_spaces(form.space, address, mask, [&](Space space, LaneMask lanes) {
    const Access access{space, AccessKind::kWrite, bytes, lanes, address, form.relaxed, data};
    const LaneMask good = checker.access(warp, instr, access, stored, nullptr);
    if (form.relaxed) {
      for_words(address, good, [&](uint64_t word) {
        checker.release_at(warp, space, word, form.scope, form.release);
      });
    }
    std::byte* host[kLanes];
    host_addresses(warp, space, address, good, host);
    scatter_lanes(data, host, good, bytes);
    if (space == Space::kGlobal || space == Space::kShared) warp.cta->progressed();
  });
  return Step::kNext;
}

template <template <uint32_t> class Of>
Handler for_bytes(uint32_t bytes) {
  switch (bytes) {
    case 1: return Of<1>::run;
    case 2: return Of<2>::run;
    case 4: return Of<4>::run;
    case 8: return Of<8>::run;
    case 16: return Of<16>::run;
    default: return nullptr;
  }
}
template <uint32_t kBytes>
struct Load {
  static constexpr Handler run = load<kBytes>;
};
template <uint32_t kBytes>
struct LoadParameter {
  static constexpr Handler run = load_parameter<kBytes>;
};
template <uint32_t kBytes>
struct Store {
  static constexpr Handler run = store<kBytes>;
};

InstrClass class_of(Space space, bool load) {
  if (space == Space::kShared) return load ? InstrClass::kSharedLoad : InstrClass::kSharedStore;
  if (space == Space::kParam) return InstrClass::kMove;
  return load ? InstrClass::kLoad : InstrClass::kStore;
}

Type take_element(Decoding& d, MemoryForm& form) {
  const Type type = d.need_type();
  form.element = static_cast<uint32_t>(bytes_of(type));
  form.is_signed = is_signed(type);
  if (form.element == 0 || form.bytes() > 32) d.unsupported("elements of this type");
  return type;
}

// {r0, r1 ...}; a single one may stand in braces as well (Triton).
template <class Take>
void take_elements(Decoding& d, uint32_t count, Take take) {
  const bool braces = count > 1 || d.next_operand() == OperandText::kVector;
  if (braces) d.open_vector();
  for (uint32_t i = 0; i < count; ++i) take();
  if (braces) d.close_vector();
}

void decode_load(Decoding& d) {
  MemoryForm form;
  take_order(d, form);
  form.space = take_space(d);
  const bool policy = take_cache_hints(d);
  form.vector = take_vector(d);
  const Type type = take_element(d, form);
  take_elements(d, form.vector, [&] { d.dest(type, true); });
  const bool symbol = d.symbol_space() == Space::kParam;
  d.address();
  if (policy) d.source(Type::kB64);
  const bool parameter = form.space == Space::kParam && symbol;
  d.handler(parameter ? for_bytes<LoadParameter>(form.element) : for_bytes<Load>(form.element),
            class_of(form.space, true), kOwnValidity);
  d.keep(std::make_shared<MemoryForm>(form));
}

void decode_store(Decoding& d) {
  if (d.has(".async")) return decode_as(d, "st.async");
  MemoryForm form;
  take_order(d, form);
  form.space = take_space(d);
  const bool policy = take_cache_hints(d);
  form.vector = take_vector(d);
  const Type type = take_element(d, form);
  d.address();
  take_elements(d, form.vector, [&] { d.source(type, true); });
  if (policy) d.source(Type::kB64);
  d.handler(for_bytes<Store>(form.element), class_of(form.space, false), kOwnValidity);
  d.keep(std::make_shared<MemoryForm>(form));
}

Step nothing(Warp&, const Instr&, LaneMask) { return Step::kNext; }

// prefetch, prefetchu, applypriority: the caches are not modelled, so these are hints without
// effect.
void decode_prefetch(Decoding& d) {
  take_space(d);
  d.take(".tensormap");
  d.take_one({".L1", ".L2", ".L2::evict_last", ".L2::evict_normal", ".L1::evict_normal"});
  d.address();
  if (d.opcode() == "applypriority") d.immediate();
  d.handler(nothing, InstrClass::kOther);
}

Step make_policy(Warp& warp, const Instr& instr, LaneMask mask) {
  zero_register(warp, instr.dest(0), mask);
  return Step::kNext;
}

// createpolicy.fractional.L2::evict_first.b64 policy, 1.0; createpolicy.range...;
// createpolicy.cvt.L2.b64
void decode_policy(Decoding& d) {
  d.take_one({".fractional", ".range", ".cvt"});
  while (!d.take_one({".global", ".L2", ".L2::evict_last", ".L2::evict_normal", ".L2::evict_first",
                      ".L2::evict_unchanged"})
              .empty()) {
  }
  d.take(".b64");
  d.dest(Type::kB64);
  while (d.next_operand() != OperandText::kNone) {
    if (d.next_operand() == OperandText::kAddress) {
      d.address();
    } else {
      d.source(d.next_operand() == OperandText::kFloatImmediate ? Type::kF32 : Type::kB32, true);
    }
  }
  d.handler(make_policy, InstrClass::kOther);
}

constexpr Opcode kOpcodes[] = {
    {"ld", decode_load},
    {"ldu", decode_load},
    {"st", decode_store},
    {"prefetch", decode_prefetch},
    {"prefetchu", decode_prefetch},
    {"applypriority", decode_prefetch},
    {"createpolicy", decode_policy},
};

}  // namespace

const OpcodeFamily kMemoryFamily{"memory", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
