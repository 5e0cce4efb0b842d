// mbarrier.init, inval, arrive, arrive_drop, expect_tx, complete_tx, test_wait, try_wait,
// pending_count and cp.async.mbarrier.arrive.
#include "simulator/exec/mbarrier.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "simulator/exec/async_copy.h"
#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"

namespace fused_peft::sim {
namespace {

constexpr int64_t kMaxTransactions = (1 << 20) - 1;

// What an instruction does, of all its qualifiers. Instr::extra.
struct MbarrierForm {
  bool generic = false;       // the address
  bool release = true;        // or acquire, of waits
  bool drop = false;          // arrive_drop
  bool expect = false;        // arrive.expect_tx
  bool no_complete = false;   // arrive.noComplete
  bool parity = false;        // of waits
  bool no_increment = false;  // cp.async.mbarrier.arrive.noinc
  int count_source = -1;      // which source holds the count, or bytes; -1: 1
};

const MbarrierForm& mbarrier_form(const Instr& instr) {
  return *static_cast<const MbarrierForm*>(instr.extra);
}

Checker& checker_of(const Warp& warp) { return *warp.cta->launch->checker; }

void report(Warp& warp, const Instr& instr, int lane, FindingKind kind, const std::string& text) {
  checker_of(warp).report(warp, instr, LaneMask{1} << lane, kind, text);
}

// Calls act(lane, place, barrier) for each lane that names a sound mbarrier.
template <class Act>
void for_mbarriers(Warp& warp, const Instr& instr, LaneMask mask, AccessKind kind, Act act) {
  uint64_t address[kLanes];
  lane_addresses(warp, instr.source(0), instr.imm, address);
  check_address(warp, instr, instr.source(0), mask);
  for (; mask != 0; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    MbarrierPlace place;
    if (!place_of(warp, instr, address[lane], mbarrier_form(instr).generic, lane, &place)) continue;
    if (!touch_mbarrier(warp, instr, place, lane, kind)) continue;
    if (Mbarrier* barrier = find_mbarrier(warp, instr, place, lane)) act(lane, place, *barrier);
  }
}

uint32_t count_of(const Warp& warp, const Instr& instr, int lane) {
  const int source = mbarrier_form(instr).count_source;
  return source < 0 ? 1 : lanes_of<uint32_t>(warp, instr.source(source))[lane];
}

Step init(Warp& warp, const Instr& instr, LaneMask mask) {
  uint64_t address[kLanes];
  lane_addresses(warp, instr.source(0), instr.imm, address);
  check_address(warp, instr, instr.source(0), mask);
  for (; mask != 0; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    MbarrierPlace place;
    if (!place_of(warp, instr, address[lane], mbarrier_form(instr).generic, lane, &place)) continue;
    if (!touch_mbarrier(warp, instr, place, lane, AccessKind::kWrite)) continue;
    const uint32_t count = count_of(warp, instr, lane);
    if (count == 0 || count > kMaxArrivals) {
      report(warp, instr, lane, FindingKind::kBarrierCount,
             "mbarrier.init with a count of " + std::to_string(count));
    }
    Mbarrier& barrier = table_of(*place.cta)[place.offset];
    if (!barrier.in_flight.empty()) {
      report(warp, instr, lane, FindingKind::kOther,
             "mbarrier.init of an mbarrier that copies in flight complete on");
    }
    Checker::drop(barrier.arriving);
    Checker::drop(barrier.completed);
    barrier = Mbarrier{};
    barrier.expected = barrier.pending = std::clamp(count, 1u, kMaxArrivals);
    write_word(barrier, place);
  }
  return Step::kNext;
}

Step inval(Warp& warp, const Instr& instr, LaneMask mask) {
  for_mbarriers(warp, instr, mask, AccessKind::kWrite,
                [&](int lane, const MbarrierPlace& place, Mbarrier& barrier) {
                  if (!barrier.in_flight.empty()) {
                    report(warp, instr, lane, FindingKind::kAsyncNotWaited,
                           "mbarrier.inval while copies that complete on it are in flight");
                  }
                  Checker::drop(barrier.arriving);
                  Checker::drop(barrier.completed);
                  table_of(*place.cta).erase(place.offset);
                  place.cta->progressed();
                });
  return Step::kNext;
}

void expect_transactions(Warp& warp, const Instr& instr, int lane, Mbarrier& barrier,
                         int64_t bytes) {
  barrier.transactions += bytes;
  if (barrier.transactions > kMaxTransactions) {
    report(
        warp, instr, lane, FindingKind::kBarrierCount,
        "the tx-count grows to " + std::to_string(barrier.transactions) + ", more than 2^20 - 1");
  }
}

void arrive_once(Warp& warp, const Instr& instr, int lane, const MbarrierPlace& place,
                 Mbarrier& barrier, uint32_t count) {
  const MbarrierForm& form = mbarrier_form(instr);
  if (count > barrier.pending || count == 0) {
    report(warp, instr, lane, FindingKind::kBarrierCount,
           "arrival of " + std::to_string(count) + " at an mbarrier that waits for " +
               std::to_string(barrier.pending) + " more");
    count = std::min(count, barrier.pending);
  }
  if (form.drop) barrier.expected -= std::min(barrier.expected, count);
  barrier.pending -= count;
  if (form.no_complete && barrier.pending == 0 && barrier.transactions == 0) {
    report(warp, instr, lane, FindingKind::kBarrierCount,
           "mbarrier.arrive.noComplete completes the phase");
  }
  settle(barrier, place);
}

Step arrive(Warp& warp, const Instr& instr, LaneMask mask) {
  const MbarrierForm& form = mbarrier_form(instr);
  for_mbarriers(warp, instr, mask, AccessKind::kAtomic,
                [&](int lane, const MbarrierPlace& place, Mbarrier& barrier) {
                  const uint32_t count = count_of(warp, instr, lane);
                  if (instr.num_dests > 0)
                    dest_lanes<uint64_t>(warp, instr.dest(0))[lane] = barrier.encode();
                  if (form.release) checker_of(warp).release(warp, barrier.arriving);
                  if (form.expect) expect_transactions(warp, instr, lane, barrier, count);
                  arrive_once(warp, instr, lane, place, barrier, form.expect ? 1 : count);
                });
  return Step::kNext;
}

Step expect_tx(Warp& warp, const Instr& instr, LaneMask mask) {
  for_mbarriers(warp, instr, mask, AccessKind::kAtomic,
                [&](int lane, const MbarrierPlace& place, Mbarrier& barrier) {
                  expect_transactions(warp, instr, lane, barrier, count_of(warp, instr, lane));
                  write_word(barrier, place);
                });
  return Step::kNext;
}

Step complete_tx(Warp& warp, const Instr& instr, LaneMask mask) {
  for_mbarriers(warp, instr, mask, AccessKind::kAtomic,
                [&](int lane, const MbarrierPlace& place, Mbarrier& barrier) {
                  complete_transactions(barrier, place, count_of(warp, instr, lane));
                });
  return Step::kNext;
}

// All cp.async of these lanes complete and then arrive. Without .noinc the count is raised by the
// one arrival first.
Step async_arrive(Warp& warp, const Instr& instr, LaneMask mask) {
  complete_async_copies(warp, mask);
  for_mbarriers(warp, instr, mask, AccessKind::kAtomic,
                [&](int lane, const MbarrierPlace& place, Mbarrier& barrier) {
                  checker_of(warp).release(warp, barrier.arriving);
                  if (!mbarrier_form(instr).no_increment) ++barrier.pending;
                  arrive_once(warp, instr, lane, place, barrier, 1);
                });
  return Step::kNext;
}

// The predicate says whether the phase has completed.
Step wait(Warp& warp, const Instr& instr, LaneMask mask) {
  const MbarrierForm& form = mbarrier_form(instr);
  LaneMask failed = 0;
  std::vector<MbarrierPlace> waited_for;
  for_mbarriers(warp, instr, mask, AccessKind::kRead,
                [&](int lane, const MbarrierPlace& place, Mbarrier& barrier) {
                  const uint64_t wanted =
                      form.parity ? lanes_of<uint32_t>(warp, instr.source(1))[lane] & 1
                                  : lanes_of<uint64_t>(warp, instr.source(1))[lane] >> 63;
                  if ((barrier.phase & 1) == wanted) {
                    failed |= LaneMask{1} << lane;
                    const bool known = !waited_for.empty() && waited_for.back().cta == place.cta &&
                                       waited_for.back().offset == place.offset;
                    if (!known) waited_for.push_back(place);
                    return;
                  }
                  if (!barrier.unobserved.empty()) observe(barrier, checker_of(warp));
                  if (form.release) checker_of(warp).acquire(warp, barrier.completed);
                });
  const LaneMask done = mask & ~failed;
  if (form.release && done != 0) checker_of(warp).synchronised_lanes(warp, done);
  // The data lands behind the last lane, so that lanes that wait for one mbarrier hear the same.
  for (const MbarrierPlace& place : waited_for) {
    land_some(warp, table_of(*place.cta).at(place.offset), place);
  }
  // A thread whose mbarrier is unsound does not wait for ever; the fault has been reported.
  set_predicate(warp, instr.dest(0), mask, done);
  return failed != 0 ? Step::kYield : Step::kNext;
}

Step pending_count(Warp& warp, const Instr& instr, LaneMask mask) {
  const uint64_t* state = lanes_of<uint64_t>(warp, instr.source(0));
  uint32_t* count = dest_lanes<uint32_t>(warp, instr.dest(0));
  for (; mask != 0; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    count[lane] = uint32_t(state[lane] >> 20) & kMaxArrivals;
  }
  return Step::kNext;
}

// ---- decoding

void take_mbarrier_space(Decoding& d, MbarrierForm& form) {
  form.generic = d.take_one({".shared", ".shared::cta", ".shared::cluster"}).empty();
}

void take_mbarrier_order(Decoding& d, MbarrierForm& form) {
  form.release = d.take_one({".release", ".acquire", ".relaxed"}) != ".relaxed";
  take_scope(d, Scope::kCta);
}

void finish(Decoding& d, const MbarrierForm& form, Handler run) {
  d.handler(run, InstrClass::kBarrier);
  d.keep(std::make_shared<MbarrierForm>(form));
}

void count_operand(Decoding& d, MbarrierForm& form) {
  form.count_source = d.instr().num_sources;
  d.source(Type::kB32);
}

void decode_arrive(Decoding& d, MbarrierForm& form) {
  form.expect = d.take(".expect_tx");
  form.no_complete = d.take(".noComplete");
  take_mbarrier_order(d, form);
  take_mbarrier_space(d, form);
  d.take(".b64");
  if (d.next_operand() != OperandText::kAddress) d.dest(Type::kB64);
  d.address();
  if (form.expect || form.no_complete || d.operands_left() > 0) count_operand(d, form);
  finish(d, form, arrive);
}

void decode_wait(Decoding& d, MbarrierForm& form, bool is_try) {
  form.parity = d.take(".parity");
  take_mbarrier_order(d, form);
  take_mbarrier_space(d, form);
  d.take(".b64");
  d.dest(Type::kPred);
  d.address();
  d.source(form.parity ? Type::kB32 : Type::kB64);
  if (is_try && d.operands_left() > 0) d.source(Type::kB32);  // how long to suspend
  finish(d, form, wait);
}

void decode_mbarrier(Decoding& d) {
  MbarrierForm form;
  const std::string_view what =
      d.take_one({".init", ".inval", ".arrive", ".arrive_drop", ".expect_tx", ".complete_tx",
                  ".test_wait", ".try_wait", ".pending_count"});
  if (what == ".arrive" || what == ".arrive_drop") {
    form.drop = what == ".arrive_drop";
    return decode_arrive(d, form);
  }
  if (what == ".test_wait" || what == ".try_wait") return decode_wait(d, form, what == ".try_wait");
  if (what == ".pending_count") {
    d.take(".b64");
    d.dest(Type::kB32);
    d.source(Type::kB64);
    return finish(d, form, pending_count);
  }
  if (what.empty()) d.unsupported("this form of mbarrier");
  take_mbarrier_order(d, form);
  take_mbarrier_space(d, form);
  d.take(".b64");
  d.address();
  if (what == ".inval") return finish(d, form, inval);
  count_operand(d, form);
  finish(d, form, what == ".init" ? init : what == ".expect_tx" ? expect_tx : complete_tx);
}

// cp.async.mbarrier.arrive{.noinc}{.shared{::cta}}.b64 [address];
void decode_async_arrive(Decoding& d) {
  MbarrierForm form;
  if (!d.take(".arrive")) d.malformed(".arrive is missing");
  form.no_increment = d.take(".noinc");
  take_mbarrier_space(d, form);
  d.take(".b64");
  d.address();
  finish(d, form, async_arrive);
}

constexpr Opcode kOpcodes[] = {{"mbarrier", decode_mbarrier},
                               {"cp.async.mbarrier", decode_async_arrive}};

}  // namespace

const OpcodeFamily kMbarrierFamily{"mbarrier", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
