// tensormap.replace and tensormap.cp_fenceproxy (PTX ISA 9.7.9.26, 9.7.13.17): tensor maps that a
// kernel makes.
#include "simulator/exec/tensor_map.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>

#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"
#include "simulator/exec/mma.h"

namespace fused_peft::sim {
namespace {

constexpr uint32_t kMapBytes = 128;
constexpr uint32_t kPieceBytes = 16;
constexpr LaneMask kPieces = (LaneMask{1} << (kMapBytes / kPieceBytes)) - 1;

enum class Field : uint8_t {
  kGlobalAddress,
  kRank,
  kBoxDim,
  kGlobalDim,
  kGlobalStride,
  kElementStride,
  kElementType,
  kInterleave,
  kSwizzle,
  kFill,
};

struct FieldName {
  std::string_view name;
  Field field;
  bool wide = false;       // a .b64 value
  bool has_ord = false;    // of a dimension
  bool immediate = false;  // numbers of PTX ISA table 33
};
constexpr FieldName kFields[] = {
    {".global_address", Field::kGlobalAddress, true},
    {".rank", Field::kRank},
    {".box_dim", Field::kBoxDim, false, true},
    {".global_dim", Field::kGlobalDim, false, true},
    {".global_stride", Field::kGlobalStride, true, true},
    {".element_stride", Field::kElementStride, false, true},
    {".elemtype", Field::kElementType, false, false, true},
    {".interleave_layout", Field::kInterleave, false, false, true},
    {".swizzle_mode", Field::kSwizzle, false, false, true},
    {".fill_mode", Field::kFill, false, false, true},
};

// Of elemtype 0, 1 ...: not the driver's numbers.
constexpr Type kElementTypes[] = {Type::kU8,   Type::kU16, Type::kU32, Type::kS32, Type::kU64,
                                  Type::kS64,  Type::kF16, Type::kF32, Type::kF32, Type::kF64,
                                  Type::kBF16, Type::kF32, Type::kF32};
constexpr uint8_t kSwizzles[] = {0, 32, 64, 128};

// Instr::extra. Sources: the address and, where the value is no immediate, the value.
struct ReplaceForm {
  Space space = Space::kGeneric;
  const FieldName* field = nullptr;
  int ord = 0;
  uint64_t value = 0;  // an immediate
};

void report(Warp& warp, const Instr& instr, int lane, FindingKind kind, const std::string& text) {
  warp.cta->launch->checker->report(warp, instr, LaneMask{1} << lane, kind, text);
}

// The 128 bytes at an address, checked as a read or a write of one lane; nullptr where they must
// not be touched.
std::byte* access_map(Warp& warp, const Instr& instr, int lane, Space space, uint64_t address,
                      AccessKind kind) {
  if (address % kMapAlign != 0) {
    report(warp, instr, lane, FindingKind::kMisaligned, "a tensor map lies at a multiple of 64");
    return nullptr;
  }
  uint64_t pieces[kLanes] = {};
  for (uint32_t i = 0; i < kMapBytes / kPieceBytes; ++i) pieces[i] = address + i * kPieceBytes;
  const Access access{space, kind, kPieceBytes, kPieces, pieces};
  LaneMask valid = 0;
  Checker& checker = *warp.cta->launch->checker;
  if (checker.access(warp, instr, access, kFullMask, &valid) != kPieces) return nullptr;
  return Checker::resolve(warp, space, address, lane);
}

// False: no value that the field can have.
bool set_field(TensorMap& map, Field field, int ord, uint64_t value) {
  switch (field) {
    case Field::kGlobalAddress: map.address = value; return value % 16 == 0;
    case Field::kRank: map.rank = uint8_t(value + 1); return value < TensorMap::kMaxRank;
    case Field::kBoxDim: map.box[ord] = uint16_t(value); return value >= 1 && value <= 256;
    case Field::kGlobalDim: map.dims[ord] = value; return value >= 1;
    case Field::kGlobalStride: map.strides[ord] = value; return value % 16 == 0;
    case Field::kElementStride:
      map.element_strides[ord] = uint8_t(value);
      return value >= 1 && value <= 8;
    case Field::kElementType:
      map.type = kElementTypes[value];
      map.element_bytes = uint8_t(bytes_of(map.type));
      return true;
    case Field::kSwizzle: map.swizzle_bytes = kSwizzles[value]; return true;
    case Field::kFill: map.fill_with_nan = value != 0; return true;
    case Field::kInterleave: return true;
  }
  return false;
}

// A map that a program has set to zeros has the first value of every field.
bool read_map(const std::byte* at, TensorMap* map) {
  std::memcpy(map, at, sizeof *map);
  if (map->magic == TensorMap::kMagic) return true;
  if (std::any_of(at, at + kMapBytes, [](std::byte byte) { return byte != std::byte{0}; }))
    return false;
  *map = TensorMap{};
  map->magic = TensorMap::kMagic;
  set_field(*map, Field::kRank, 0, 0);
  set_field(*map, Field::kElementType, 0, 0);
  return true;
}

void replace_one(Warp& warp, const Instr& instr, int lane, Space space, uint64_t address) {
  const auto& form = *static_cast<const ReplaceForm*>(instr.extra);
  std::byte* const at = access_map(warp, instr, lane, space, address, AccessKind::kWrite);
  if (at == nullptr) return;
  TensorMap map;
  if (!read_map(at, &map)) {
    report(warp, instr, lane, FindingKind::kOther, "the address is not that of a tensor map");
    return;
  }
  uint64_t value = form.value;
  if (!form.field->immediate) {
    value = form.field->wide ? lanes_of<uint64_t>(warp, instr.source(1))[lane]
                             : lanes_of<uint32_t>(warp, instr.source(1))[lane];
  }
  if (!set_field(map, form.field->field, form.ord, value)) {
    report(warp, instr, lane, FindingKind::kOther,
           "no value for " + std::string(form.field->name.substr(1)) +
               " of a tensor map: " + std::to_string(value));
    return;
  }
  std::memcpy(at, &map, sizeof map);
}

Step replace(Warp& warp, const Instr& instr, LaneMask mask) {
  const auto& form = *static_cast<const ReplaceForm*>(instr.extra);
  uint64_t address[kLanes];
  lane_addresses(warp, instr.source(0), instr.imm, address);
  check_address(warp, instr, instr.source(0), mask);
  for_spaces(form.space, address, mask, [&](Space space, LaneMask lanes) {
    for (LaneMask left = lanes; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      replace_one(warp, instr, lane, space, address[lane]);
    }
  });
  warp.cta->progressed();
  return Step::kNext;
}

// The warp copies one map from shared to global memory and releases it.
template <Scope kScope>
Step copy_map(Warp& warp, const Instr& instr, LaneMask mask) {
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  const int lane = std::countr_zero(mask);
  uint64_t to[kLanes], from[kLanes];
  lane_addresses(warp, instr.source(0), 0, to);
  lane_addresses(warp, instr.source(1), 0, from);
  check_address(warp, instr, instr.source(0), mask);
  check_address(warp, instr, instr.source(1), mask);
  const std::byte* const source =
      access_map(warp, instr, lane, Space::kShared, from[lane], AccessKind::kRead);
  std::byte* const dest =
      access_map(warp, instr, lane, Space::kGlobal, to[lane], AccessKind::kWrite);
  if (source == nullptr || dest == nullptr) return Step::kNext;
  std::memcpy(dest, source, kMapBytes);
  warp.cta->launch->checker->fence(warp, kScope);
  warp.cta->progressed();
  return Step::kNext;
}

// tensormap.replace.tile.FIELD{.global, .shared::cta}.b1024.type [addr], {ord,} new_val;
void decode_replace(Decoding& d) {
  ReplaceForm form;
  if (!d.take(".tile")) d.unsupported("modes other than .tile");
  for (const FieldName& field : kFields) {
    if (d.take(field.name)) form.field = &field;
  }
  if (form.field == nullptr) d.unsupported("this field of a tensor map");
  form.space = take_space(d);
  d.take(".b1024");
  if (!d.take(form.field->wide ? ".b64" : ".b32")) d.malformed("the value's type is another one");
  d.address();
  const int64_t offset = d.instr().imm;
  if (form.field->has_ord) {
    const int64_t ord = d.immediate();
    const int count =
        form.field->field == Field::kGlobalStride ? TensorMap::kMaxRank - 1 : TensorMap::kMaxRank;
    if (ord < 0 || ord >= count) d.malformed("a tensor has no such dimension");
    form.ord = int(ord);
  }
  if (form.field->immediate) {
    form.value = uint64_t(d.immediate());
    const uint64_t count = form.field->field == Field::kElementType ? std::size(kElementTypes)
                           : form.field->field == Field::kSwizzle   ? std::size(kSwizzles)
                           : form.field->field == Field::kFill      ? 2
                                                                    : 1;
    if (form.value >= count) {
      d.unsupported(std::string(form.field->name) + " " + std::to_string(form.value));
    }
  } else {
    d.source(form.field->wide ? Type::kB64 : Type::kB32);
  }
  d.instr().imm = offset;
  d.handler(replace, InstrClass::kOther);
  d.keep(std::make_shared<ReplaceForm>(form));
}

// tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.scope.sync.aligned
//     [dst], [src], 128;
void decode_copy(Decoding& d) {
  d.take(".global");
  d.take(".shared::cta");
  d.take(".tensormap::generic");
  d.take(".release");
  const std::string_view scope = d.take_one({".cta", ".cluster", ".gpu", ".sys"});
  d.take(".sync");
  d.take(".aligned");
  d.address();
  if (d.instr().imm != 0) d.unsupported("an address with an offset");
  d.address();
  if (d.instr().imm != 0) d.unsupported("an address with an offset");
  if (d.immediate() != kMapBytes) d.malformed("the size is 128");
  d.handler(scope == ".cta"       ? copy_map<Scope::kCta>
            : scope == ".cluster" ? copy_map<Scope::kCluster>
            : scope == ".sys"     ? copy_map<Scope::kSystem>
                                  : copy_map<Scope::kDevice>,
            InstrClass::kFence);
}

void decode_tensor_map(Decoding& d) {
  if (d.take(".replace")) return decode_replace(d);
  if (d.take(".cp_fenceproxy")) return decode_copy(d);
  d.unsupported("this form of tensormap");
}

constexpr Opcode kOpcodes[] = {{"tensormap", decode_tensor_map}};

}  // namespace

const OpcodeFamily kTensorMapFamily{"tensormap", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
