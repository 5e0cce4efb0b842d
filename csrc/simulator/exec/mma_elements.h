// Elements of the tensor core's operands, as floats: every product of two of them and, of the
// integer types, every sum that an instruction forms is exact in single precision.
#pragma once

#include "simulator/core/types.h"
#include "simulator/exec/half.h"

namespace fused_peft::sim {

// Each has kPerRegister, how many elements a 32-bit register holds, and load(): `count` registers
// (a multiple of 8) to floats, lane after lane.
struct F16Elements {
  static constexpr int kPerRegister = 2;
  static void load(const uint32_t* registers, float* values, int count) {
    F16Lanes::from(reinterpret_cast<const uint16_t*>(registers), values, 2 * count);
  }
};

struct BF16Elements {
  static constexpr int kPerRegister = 2;
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < count; ++i) {
      values[2 * i] = float_of(registers[i] << 16);
      values[2 * i + 1] = float_of(registers[i] & 0xffff0000);
    }
  }
};

// The tensor core does not look at the 13 low bits.
struct TF32Elements {
  static constexpr int kPerRegister = 1;
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < count; ++i) values[i] = float_of(registers[i] & 0xffffe000);
  }
};

// E5M2 is the upper byte of a half.
struct E5M2Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(registers);
    alignas(64) uint16_t halves[4 * kLanes];
    for (int i = 0; i < 4 * count; ++i) halves[i] = uint16_t(bytes[i] << 8);
    F16Lanes::from(halves, values, 4 * count);
  }
};

// E4M3's fields in their places in a half make a value too small by the difference of the biases,
// 2^8.
struct E4M3Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(registers);
    alignas(64) uint16_t halves[4 * kLanes];
    for (int i = 0; i < 4 * count; ++i) {
      halves[i] = uint16_t((bytes[i] & 0x80) << 8 | (bytes[i] & 0x7f) << 7);
    }
    F16Lanes::from(halves, values, 4 * count);
    for (int i = 0; i < 4 * count; ++i) {
      values[i] = std::abs(values[i]) == 1.875f ? float_of(F32Format::kNan) : values[i] * 256.0f;
    }
  }
};

struct S8Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    const auto* bytes = reinterpret_cast<const int8_t*>(registers);
    for (int i = 0; i < 4 * count; ++i) values[i] = float(bytes[i]);
  }
};

struct U8Elements {
  static constexpr int kPerRegister = 4;
  static void load(const uint32_t* registers, float* values, int count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(registers);
    for (int i = 0; i < 4 * count; ++i) values[i] = float(bytes[i]);
  }
};

template <bool kSigned>
struct Int4Elements {
  static constexpr int kPerRegister = 8;
  static void load(const uint32_t* registers, float* values, int count) {
    for (int i = 0; i < count; ++i) {
      for (unsigned j = 0; j < 8; ++j) {
        const uint32_t shifted = registers[i] << (28 - 4 * j);
        values[8 * i + int(j)] =
            kSigned ? float(int32_t(shifted) >> 28) : float(int32_t(shifted >> 28));
      }
    }
  }
};
using S4Elements = Int4Elements<true>;
using U4Elements = Int4Elements<false>;

}  // namespace fused_peft::sim
