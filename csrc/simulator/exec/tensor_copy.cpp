// cp.async.bulk.tensor, cp.reduce.async.bulk.tensor and their prefetch, tile mode (PTX
// ISA 9.7.9.25.5).
#include <algorithm>
#include <cstring>
#include <functional>

#include "simulator/exec/bulk.h"
#include "simulator/exec/memory_form.h"
#include "simulator/exec/tensor_map.h"

namespace fused_peft::sim {
namespace {

constexpr uint64_t kBoxAlign = 128;  // of a box in shared memory

Checker& checker_of(const Warp& warp) { return *warp.cta->launch->checker; }

void report(Warp& warp, const Instr& instr, int lane, FindingKind kind, const std::string& text) {
  checker_of(warp).report(warp, instr, LaneMask{1} << lane, kind, text);
}

// The tensor map at a generic address; false (and reported) where there is none.
bool read_map(Warp& warp, const Instr& instr, int lane, uint64_t address, TensorMap* map) {
  uint64_t pieces[kLanes] = {};
  constexpr int kPieces = 128 / 16;
  for (int i = 0; i < kPieces; ++i) pieces[i] = address + uint64_t(i) * 16;
  if (address % kMapAlign != 0) {
    report(warp, instr, lane, FindingKind::kMisaligned, "a tensor map lies at a multiple of 64");
    return false;
  }
  LaneMask valid = 0;
  const LaneMask lanes = (LaneMask{1} << kPieces) - 1;
  const Access access{Space::kGlobal, AccessKind::kRead, 16, lanes, pieces};
  if (checker_of(warp).access(warp, instr, access, 0, &valid) != lanes) return false;
  std::memcpy(map, reinterpret_cast<const void*>(address), sizeof *map);
  if (map->magic != TensorMap::kMagic) {
    report(warp, instr, lane, FindingKind::kOther, "the address is not that of a tensor map");
    return false;
  }
  if (map->rank != bulk_form(instr).rank) {
    report(warp, instr, lane, FindingKind::kOther,
           "the tensor map has " + std::to_string(map->rank) + " dimensions, the instruction " +
               std::to_string(bulk_form(instr).rank));
    return false;
  }
  return true;
}

// The extent of the box in one dimension: its elements that are copied.
uint32_t extent(const TensorMap& map, int dim) {
  const uint32_t stride = dim == 0 ? 1 : map.element_strides[dim];
  return (map.box[dim] + stride - 1) / stride;
}

// One row of a box: consecutive elements of dimension 0, whose bytes in shared memory start at
// `offset` in the box.
void add_row(const TensorMap& map, std::byte* row, bool inside, int64_t first, uint64_t shared,
             std::vector<CopyUnit>& units) {
  const auto width = int64_t(map.box[0]) * map.element_bytes;
  const int64_t begin = first * map.element_bytes;  // of the row, from element 0 on
  const auto limit = int64_t(map.dims[0] * map.element_bytes);
  for (int64_t at = 0; at < width; at += kUnitBytes) {
    CopyUnit unit;
    unit.shared = swizzled(shared + uint64_t(at), map.swizzle_bytes);
    unit.host = row + begin + at;
    const int64_t low = std::clamp<int64_t>(-(begin + at), 0, kUnitBytes);
    const int64_t high = std::clamp<int64_t>(limit - (begin + at), 0, kUnitBytes);
    unit.begin = uint8_t(low);
    unit.end = uint8_t(inside ? std::max(low, high) : low);
    units.push_back(unit);
  }
}

// Every 16 bytes of the box at these coordinates.
std::vector<CopyUnit> box_units(const TensorMap& map, const int32_t* coordinates, uint64_t shared) {
  std::vector<CopyUnit> units;
  const uint64_t row_bytes = uint64_t(map.box[0]) * map.element_bytes;
  uint32_t index[TensorMap::kMaxRank] = {};
  uint32_t extents[TensorMap::kMaxRank] = {1, 1, 1, 1, 1};
  for (int dim = 1; dim < map.rank; ++dim) extents[dim] = extent(map, dim);
  for (uint64_t offset = 0;; offset += row_bytes) {
    bool inside = true;
    int64_t from = 0;
    for (int dim = 1; dim < map.rank; ++dim) {
      const int64_t at = coordinates[dim] + int64_t(index[dim]) * map.element_strides[dim];
      inside = inside && at >= 0 && at < int64_t(map.dims[dim]);
      from += at * int64_t(map.strides[dim - 1]);
    }
    auto* const row = reinterpret_cast<std::byte*>(map.address + uint64_t(inside ? from : 0));
    add_row(map, row, inside, coordinates[0], shared + offset, units);
    int dim = 1;
    while (dim < map.rank && ++index[dim] == extents[dim]) index[dim++] = 0;
    if (dim >= map.rank) return units;
  }
}

void fill_pattern(const TensorMap& map, std::byte* fill) {
  std::memset(fill, 0, kUnitBytes);
  if (!map.fill_with_nan) return;
  // The quiet NaN of each type, all ones in the payload.
  std::memset(fill, 0xff, kUnitBytes);
  for (uint32_t i = map.element_bytes - 1u; i < kUnitBytes; i += map.element_bytes)
    fill[i] = std::byte{0x7f};
}

void load_box(Warp& warp, const Instr& instr, int lane, const TensorMap& map,
              const int32_t* coordinates, const MbarrierPlace& to, uint64_t barrier_address) {
  const BulkForm& form = bulk_form(instr);
  MbarrierPlace barrier;
  if (!place_of(warp, instr, barrier_address, false, lane, &barrier)) return;
  std::byte fill[kUnitBytes];
  fill_pattern(map, fill);
  const auto load = [&](Cta& target, uint64_t at) {
    issue_load(warp, instr, lane, target, at, box_units(map, coordinates, to.offset),
               Space::kGlobal, fill);
  };
  if (form.multicast < 0) return load(*to.cta, barrier_address);
  const uint16_t mask = lanes_of<uint16_t>(warp, instr.source(form.multicast))[lane];
  const std::vector<Cta*>& ctas = warp.cta->cluster->ctas;
  if (mask >> ctas.size() != 0) {
    report(warp, instr, lane, FindingKind::kOutOfBounds,
           "the multicast mask names CTAs that the cluster does not have");
  }
  for (std::size_t i = 0; i < ctas.size(); ++i) {
    if (mask >> i & 1) load(*ctas[i], shared_address(*ctas[i], barrier.offset));
  }
}

Step copy_tensor(Warp& warp, const Instr& instr, LaneMask mask) {
  const BulkForm& form = bulk_form(instr);
  uint64_t shared[kLanes], barrier[kLanes], maps[kLanes];
  const bool stores = form.kind == BulkKind::kStore;
  const int map_source = stores ? 0 : 1, shared_source = stores ? 1 + int(form.rank) : 0;
  lane_addresses(warp, instr.source(map_source), 0, maps);
  lane_addresses(warp, instr.source(shared_source), stores ? form.from_offset : form.to_offset,
                 shared);
  if (form.barrier >= 0)
    lane_addresses(warp, instr.source(form.barrier), form.barrier_offset, barrier);
  check_address(warp, instr, instr.source(map_source), mask);
  check_address(warp, instr, instr.source(shared_source), mask);
  for (LaneMask left = distinct_lanes(warp, instr, mask); left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    TensorMap map;
    MbarrierPlace place;
    if (!read_map(warp, instr, lane, maps[lane], &map)) continue;
    if (!place_of(warp, instr, shared[lane], false, lane, &place)) continue;
    if (place.offset % kBoxAlign != 0) {
      report(warp, instr, lane, FindingKind::kMisaligned,
             "a tensor's box lies at a multiple of 128 in shared memory");
      continue;
    }
    int32_t coordinates[TensorMap::kMaxRank] = {};
    for (uint32_t i = 0; i < form.rank; ++i) {
      coordinates[i] = lanes_of<int32_t>(warp, instr.source(map_source + 1 + int(i)))[lane];
    }
    if (!stores) {
      load_box(warp, instr, lane, map, coordinates, place, barrier[lane]);
      continue;
    }
    BulkStore store;
    if (form.reduction != Reduction::kNone) {
      store.combine = find_reduction(form.reduction, map.type);
    }
    if (form.reduction != Reduction::kNone && store.combine == nullptr) {
      report(warp, instr, lane, FindingKind::kOther,
             std::string("no such reduction of ") + name_of(map.type));
      continue;
    }
    store.units = box_units(map, coordinates, place.offset);
    issue_store(warp, instr, lane, std::move(store));
  }
  return Step::kNext;
}

Step prefetch_tensor(Warp& warp, const Instr& instr, LaneMask mask) {
  check_address(warp, instr, instr.source(0), mask);
  return Step::kNext;
}

// "[map, {c0, c1}]"
void tensor_operand(Decoding& d, uint32_t rank) {
  d.open_address();
  d.source(Type::kU64);
  if (d.vector_length() != int(rank)) d.malformed("one coordinate for each dimension");
  d.open_vector();
  for (uint32_t i = 0; i < rank; ++i) d.source(Type::kB32);
  d.close_vector();
  d.close_address();
}

}  // namespace

void decode_tensor_copy(Decoding& d, BulkForm form, bool is_prefetch) {
  const std::string_view dims = d.take_one({".1d", ".2d", ".3d", ".4d", ".5d"});
  if (dims.empty()) d.malformed("one of .1d to .5d");
  form.rank = uint32_t(dims[1] - '0');
  for (std::string_view mode :
       {".im2col", ".im2col::w", ".im2col::w::128", ".im2col_no_offs", ".tile::gather4",
        ".tile::scatter4", ".cta_group::1", ".cta_group::2"}) {
    if (d.has(mode)) d.unsupported("qualifier " + std::string(mode));
  }
  d.take(".tile");
  if (is_prefetch) {
    d.take(".L2");
    d.take(".global");
    const bool policy = d.take(".L2::cache_hint");
    tensor_operand(d, form.rank);
    if (policy) d.source(Type::kB64);
    return d.handler(prefetch_tensor, InstrClass::kAsyncCopy);
  }
  bool multicast = false;
  const bool policy = take_bulk_qualifiers(d, form, &multicast);
  if (form.kind == BulkKind::kSharedToShared) d.malformed("a tensor lies in global memory");
  if (form.kind == BulkKind::kStore) {
    tensor_operand(d, form.rank);
    d.address();
    form.from_offset = d.instr().imm;
  } else {
    d.address();
    form.to_offset = d.instr().imm;
    tensor_operand(d, form.rank);
    form.barrier = d.instr().num_sources;
    d.address();
    form.barrier_offset = d.instr().imm;
  }
  if (multicast) {
    form.multicast = d.instr().num_sources;
    d.source(Type::kB16);
  }
  if (policy) d.source(Type::kB64);
  d.handler(copy_tensor, InstrClass::kAsyncCopy);
  d.keep(std::make_shared<BulkForm>(form));
}

}  // namespace fused_peft::sim
