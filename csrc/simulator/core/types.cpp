#include "simulator/core/types.h"

#include <string_view>

namespace fused_peft::sim {
namespace {

struct NamedType {
  Type type;
  const char* name;
};

constexpr NamedType kTypes[] = {
    {Type::kNone, "(none)"},    {Type::kPred, ".pred"},     {Type::kB8, ".b8"},
    {Type::kB16, ".b16"},       {Type::kB32, ".b32"},       {Type::kB64, ".b64"},
    {Type::kB128, ".b128"},     {Type::kU8, ".u8"},         {Type::kU16, ".u16"},
    {Type::kU32, ".u32"},       {Type::kU64, ".u64"},       {Type::kS8, ".s8"},
    {Type::kS16, ".s16"},       {Type::kS32, ".s32"},       {Type::kS64, ".s64"},
    {Type::kF16, ".f16"},       {Type::kBF16, ".bf16"},     {Type::kTF32, ".tf32"},
    {Type::kF32, ".f32"},       {Type::kF64, ".f64"},       {Type::kE4M3, ".e4m3"},
    {Type::kE5M2, ".e5m2"},     {Type::kF16x2, ".f16x2"},   {Type::kBF16x2, ".bf16x2"},
    {Type::kE4M3x2, ".e4m3x2"}, {Type::kE5M2x2, ".e5m2x2"}, {Type::kU16x2, ".u16x2"},
    {Type::kS16x2, ".s16x2"},   {Type::kF32x2, ".f32x2"},
};

// name_of() indexes the table by the enumerator.
constexpr bool in_order() {
  for (int i = 0; i < int(std::size(kTypes)); ++i) {
    if (int(kTypes[i].type) != i) return false;
  }
  return int(Type::kF32x2) + 1 == int(std::size(kTypes));
}
static_assert(in_order());

}  // namespace

Type type_from_name(const char* text, int length) {
  const std::string_view name(text, std::size_t(length));
  for (const NamedType& entry : kTypes) {
    if (name == entry.name) return entry.type;
  }
  return Type::kNone;
}

const char* name_of(Type type) { return kTypes[int(type)].name; }

}  // namespace fused_peft::sim
