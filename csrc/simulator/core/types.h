// The PTX fundamental and packed types (PTX ISA 5.2), and what a lane of each occupies.
#pragma once

#include <cstdint>

namespace fused_peft::sim {

constexpr int kLanes = 32;
using LaneMask = uint32_t;
constexpr LaneMask kFullMask = 0xffffffffu;

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBF16,
  kTF32,
  kF32,
  kF64,
  kE4M3,
  kE5M2,
  kF16x2,
  kBF16x2,
  kE4M3x2,
  kE5M2x2,
  kU16x2,
  kS16x2,
  kF32x2,
};

// Bytes of one lane's value; 0 for a predicate, which is one bit of a LaneMask.
constexpr int bytes_of(Type type) {
  switch (type) {
    case Type::kNone:
    case Type::kPred: return 0;
    case Type::kB8:
    case Type::kU8:
    case Type::kS8:
    case Type::kE4M3:
    case Type::kE5M2: return 1;
    case Type::kB16:
    case Type::kU16:
    case Type::kS16:
    case Type::kF16:
    case Type::kBF16:
    case Type::kE4M3x2:
    case Type::kE5M2x2: return 2;
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64:
    case Type::kF32x2: return 8;
    case Type::kB128: return 16;
    default: return 4;
  }
}

constexpr bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64 ||
         type == Type::kS16x2;
}

constexpr bool is_float(Type type) {
  return type == Type::kF16 || type == Type::kBF16 || type == Type::kTF32 || type == Type::kF32 ||
         type == Type::kF64 || type == Type::kF16x2 || type == Type::kBF16x2 ||
         type == Type::kF32x2 || type == Type::kE4M3 || type == Type::kE5M2;
}

// ".u32" -> kU32; kNone where the text is no type.
Type type_from_name(const char* text, int length);
const char* name_of(Type type);

// State spaces (PTX ISA 5.1). kParam is the parameters of the entry function; those of a device
// function live in the calling thread's private memory at kCalleeParam and above.
enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };

// Generic addresses: global, const and parameter memory is host memory at its own address. The
// windows lie above every user-space address, so a generic address tells its space by itself.
// Bits 24..31 of a shared address are 0 for the CTA's own memory, else 1 + the rank of the CTA in
// the cluster (mapa); its low 24 bits are the offset, of which the first kSharedStart are a fault.
constexpr uint64_t kSharedWindow = uint64_t{1} << 52;
constexpr uint64_t kLocalWindow = uint64_t{1} << 53;
constexpr uint64_t kWindowSize = uint64_t{1} << 32;
constexpr uint32_t kSharedStart = 1024;
constexpr int kSharedRankShift = 24;
// A .param address of this size or more is a device function's parameter: that offset less
// kCalleeParam into the thread's private memory.
constexpr uint64_t kCalleeParam = uint64_t{1} << 30;

}  // namespace fused_peft::sim
