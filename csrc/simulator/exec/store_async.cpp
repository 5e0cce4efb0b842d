// st.async and red.async into the shared memory of another CTA of the cluster (PTX ISA 9.7.9.12,
// 9.7.13.7). Like a bulk copy they are under way until a thread has seen the phase of their
// mbarrier complete.
#include <bit>
#include <cstring>
#include <iterator>

#include "simulator/exec/bulk.h"
#include "simulator/exec/bulk_reduce.h"
#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {
namespace {

// Sources: the address, the values, the mbarrier. Instr::extra.
struct StoreAsyncForm {
  bool generic = false;
  uint32_t element = 0, vector = 1;  // bytes of an element, elements of a lane
  int64_t to_offset = 0, barrier_offset = 0;
  Combine combine = nullptr;  // red.async

  uint32_t bytes() const { return element * vector; }
};

// Both addresses lie in one CTA of the cluster, which is not the thread's own.
bool find_places(Warp& warp, const Instr& instr, bool generic, int lane, uint64_t to,
                 uint64_t barrier, MbarrierPlace* to_place, MbarrierPlace* barrier_place) {
  if (!place_of(warp, instr, to, generic, lane, to_place) ||
      !place_of(warp, instr, barrier, generic, lane, barrier_place)) {
    return false;
  }
  if (to_place->cta == barrier_place->cta && to_place->cta != warp.cta) return true;
  warp.cta->launch->checker->report(
      warp, instr, LaneMask{1} << lane, FindingKind::kOther,
      "destination and mbarrier must lie in one CTA of the cluster, and not in the thread's own");
  return false;
}

Step store_async(Warp& warp, const Instr& instr, LaneMask mask) {
  const auto& form = *static_cast<const StoreAsyncForm*>(instr.extra);
  const int barrier_source = 1 + int(form.vector);
  uint64_t to[kLanes], barrier[kLanes];
  lane_addresses(warp, instr.source(0), form.to_offset, to);
  lane_addresses(warp, instr.source(barrier_source), form.barrier_offset, barrier);
  check_address(warp, instr, instr.source(0), mask);
  check_address(warp, instr, instr.source(barrier_source), mask);
  LaneMask initialised = valid_guard(warp, instr);
  for (uint32_t i = 0; i < form.vector; ++i)
    initialised &= valid_lanes(warp, instr.source(1 + int(i)));
  for (; mask != 0; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    MbarrierPlace place, completes_on;
    if (!find_places(warp, instr, form.generic, lane, to[lane], barrier[lane], &place,
                     &completes_on)) {
      continue;
    }
    auto store = std::make_unique<BulkLoad>();
    store->target = place.cta;
    store->combine = form.combine;
    store->unit_bytes = form.bytes();
    store->bytes = form.bytes();
    for (uint32_t i = 0; i < form.vector; ++i) {
      std::memcpy(store->values + i * form.element,
                  lanes_of<std::byte>(warp, instr.source(1 + int(i))) + lane * int(form.element),
                  form.element);
    }
    CopyUnit unit;
    unit.shared = place.offset;
    unit.host = store->values;
    unit.end = uint8_t(form.bytes());
    unit.initialised = initialised >> lane & 1;
    store->units.push_back(unit);
    issue(warp, instr, lane, completes_on, std::move(store));
  }
  return Step::kNext;
}

// Behind the order and the scope: {.shared::cluster}{.mbarrier::complete_tx::bytes}.
void take_destination(Decoding& d, StoreAsyncForm& form) {
  form.generic = !d.take(".shared::cluster");
  d.take(".mbarrier::complete_tx::bytes");
}

void take_operands(Decoding& d, StoreAsyncForm& form, Type type) {
  form.element = uint32_t(bytes_of(type));
  d.address();
  form.to_offset = d.instr().imm;
  if (form.vector > 1) d.open_vector();
  for (uint32_t i = 0; i < form.vector; ++i) d.source(type);
  if (form.vector > 1) d.close_vector();
  d.address();
  form.barrier_offset = d.instr().imm;
  d.handler(store_async, InstrClass::kAsyncCopy);
  d.keep(std::make_shared<StoreAsyncForm>(form));
}

// st.async{.weak}{.shared::cluster}{.mbarrier::complete_tx::bytes}{.v2, .v4}.type [a], b, [mbar];
void decode_store_async(Decoding& d) {
  StoreAsyncForm form;
  d.take(".async");
  d.take(".weak");
  take_destination(d, form);
  form.vector = take_vector(d);
  const Type type = d.need_type();
  const int bytes = bytes_of(type);
  if ((bytes != 4 && bytes != 8) || bytes * int(form.vector) > int(kUnitBytes)) {
    d.malformed("elements of 4 or 8 bytes, at most 16 bytes together");
  }
  take_operands(d, form, type);
}

// red.async.relaxed.cluster{.shared::cluster}.mbarrier::complete_tx::bytes.op.type [a], b, [mbar];
void decode_reduce_async(Decoding& d) {
  StoreAsyncForm form;
  d.take(".async");
  if (!d.take(".relaxed") || !d.take(".cluster")) d.unsupported("red.async other than relaxed");
  take_destination(d, form);
  BulkForm reduction;
  take_reduction(d, reduction);
  const Type type = d.need_type();
  const Reduction op = reduction.reduction;
  const bool bitwise = op == Reduction::kAnd || op == Reduction::kOr || op == Reduction::kXor;
  const bool fits = bitwise ? type == Type::kB32
                            : type == Type::kU32 || (type == Type::kS32 && op <= Reduction::kMax) ||
                                  (type == Type::kU64 && op == Reduction::kAdd);
  if (!fits) d.malformed("no such operation of this type");
  form.combine = find_reduction(op, type);
  take_operands(d, form, type);
}

constexpr Opcode kOpcodes[] = {{"st.async", decode_store_async},
                               {"red.async", decode_reduce_async}};

}  // namespace

const OpcodeFamily kStoreAsyncFamily{"st.async", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
