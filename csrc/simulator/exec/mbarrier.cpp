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

constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr int64_t kMaxTransactions = (1 << 20) - 1;
constexpr uint32_t kWordBytes = 8;

// By offset in the CTA's shared memory.
struct MbarrierTable : std::unordered_map<uint32_t, Mbarrier> {
  ~MbarrierTable() {
    for (auto& [offset, barrier] : *this) {
      Checker::drop(barrier.arriving);
      Checker::drop(barrier.completed);
    }
  }
};

MbarrierTable& table_of(Cta& cta) {
  if (!cta.mbarriers) cta.mbarriers = std::make_shared<MbarrierTable>();
  return *static_cast<MbarrierTable*>(cta.mbarriers.get());
}

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

void write_word(const Mbarrier& barrier, const MbarrierPlace& place) {
  const uint64_t word = barrier.encode();
  std::memcpy(place.cta->shared + place.offset, &word, sizeof word);
  place.cta->progressed();
}

// A phase is over when nothing more is expected: the next begins.
void settle(Mbarrier& barrier, const MbarrierPlace& place) {
  if (barrier.pending == 0 && barrier.transactions == 0) {
    ++barrier.phase;
    barrier.pending = barrier.expected;
    Checker::drop(barrier.completed);
    barrier.completed = std::exchange(barrier.arriving, SyncVar{});
    std::move(barrier.landed.begin(), barrier.landed.end(), std::back_inserter(barrier.unobserved));
    barrier.landed.clear();
  }
  write_word(barrier, place);
}

// The bytes of the mbarrier as memory: bounds, alignment, and races of init with the rest.
bool touch_word(Warp& warp, const Instr& instr, const MbarrierPlace& place, int lane,
                AccessKind kind) {
  uint64_t address[kLanes] = {};
  address[lane] = place.address;
  const LaneMask lanes = LaneMask{1} << lane;
  LaneMask valid = 0;
  Access access{Space::kShared, kind, kWordBytes, lanes, address};
  access.relaxed = kind != AccessKind::kWrite;
  return checker_of(warp).access(warp, instr, access, lanes, &valid) != 0;
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
    if (!touch_word(warp, instr, place, lane, kind)) continue;
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
    if (!touch_word(warp, instr, place, lane, AccessKind::kWrite)) continue;
    const uint32_t count = count_of(warp, instr, lane);
    if (count == 0 || count > kMaxCount) {
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
    barrier.expected = barrier.pending = std::clamp(count, 1u, kMaxCount);
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

// The copies of completed phases that nobody had waited for: their bytes are in flight no more.
void observe(Mbarrier& barrier, Checker& checker) {
  for (const std::unique_ptr<BulkLoad>& load : barrier.unobserved) {
    for (std::size_t first = 0; first < load->units.size(); first += kLanes) {
      uint64_t address[kLanes] = {};
      LaneMask lanes = 0, initialised = 0;
      for (std::size_t i = 0; i < std::min<std::size_t>(kLanes, load->units.size() - first); ++i) {
        const CopyUnit& unit = load->units[first + i];
        address[i] = shared_address(*load->target, unit.shared);
        lanes |= LaneMask{!unit.skip} << i;
        initialised |= LaneMask{unit.initialised} << i;
      }
      if (lanes == 0) continue;
      Access access{Space::kShared, AccessKind::kWrite, kUnitBytes, lanes, address};
      access.async_proxy = true;
      checker.end_async(*load->issuer, *load->instr, access, initialised);
    }
    checker.release(*load->issuer, barrier.completed);
  }
  barrier.unobserved.clear();
}

// Some of what is in flight lands, now that a thread waits for it: all, or as the dice fall.
void land_some(Warp& warp, Mbarrier& barrier, const MbarrierPlace& place) {
  const bool all = warp.cta->launch->options.async_timing != AsyncTiming::kRandom;
  for (std::size_t i = barrier.in_flight.size(); i-- > 0;) {
    if (all || i == 0 || moves_early(warp)) land(barrier, place, i);
  }
}

// The predicate says whether the phase has completed.
template <bool kTry>
Step wait(Warp& warp, const Instr& instr, LaneMask mask) {
  const MbarrierForm& form = mbarrier_form(instr);
  LaneMask done = 0, failed = 0;
  for_mbarriers(warp, instr, mask, AccessKind::kRead,
                [&](int lane, const MbarrierPlace& place, Mbarrier& barrier) {
                  const uint64_t wanted =
                      form.parity ? lanes_of<uint32_t>(warp, instr.source(1))[lane] & 1
                                  : lanes_of<uint64_t>(warp, instr.source(1))[lane] >> 63;
                  if ((barrier.phase & 1) == wanted) {
                    failed |= LaneMask{1} << lane;
                    land_some(warp, barrier, place);
                    return;
                  }
                  done |= LaneMask{1} << lane;
                  if (!barrier.unobserved.empty()) observe(barrier, checker_of(warp));
                  if (form.release) checker_of(warp).acquire(warp, barrier.completed);
                });
  // A thread whose mbarrier is unsound does not wait for ever; the fault has been reported.
  done |= mask & ~failed;
  set_predicate(warp, instr.dest(0), mask, done);
  return failed != 0 ? Step::kYield : Step::kNext;
}

Step pending_count(Warp& warp, const Instr& instr, LaneMask mask) {
  const uint64_t* state = lanes_of<uint64_t>(warp, instr.source(0));
  uint32_t* count = dest_lanes<uint32_t>(warp, instr.dest(0));
  for (; mask != 0; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    count[lane] = uint32_t(state[lane] >> 20) & kMaxCount;
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
  finish(d, form, is_try ? wait<true> : wait<false>);
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

// Bit 63: the phase's parity; pending and expected arrivals; the tx-count.
uint64_t Mbarrier::encode() const {
  return (phase & 1) << 63 | (uint64_t(transactions) & 0x1fffff) << 40 |
         uint64_t(pending & kMaxCount) << 20 | (expected & kMaxCount);
}

uint64_t shared_address(const Cta& cta, uint64_t offset) {
  return (uint64_t{cta.rank} + 1) << kSharedRankShift | offset;
}

bool place_of(Warp& warp, const Instr& instr, uint64_t address, bool generic, int lane,
              MbarrierPlace* place) {
  if (generic && split_generic(address) != Space::kShared) {
    report(warp, instr, lane, FindingKind::kOutOfBounds,
           "the address of the mbarrier is not in shared memory");
    return false;
  }
  const uint64_t rank = address >> kSharedRankShift;
  const std::vector<Cta*>& ctas = warp.cta->cluster->ctas;
  if (rank > ctas.size()) {
    report(warp, instr, lane, FindingKind::kOutOfBounds,
           "the mbarrier's CTA is not in the cluster");
    return false;
  }
  place->cta = rank == 0 ? warp.cta : ctas[rank - 1];
  place->offset = uint32_t(address & ((uint64_t{1} << kSharedRankShift) - 1));
  place->address = address;
  return true;
}

Mbarrier* find_mbarrier(Warp& warp, const Instr& instr, const MbarrierPlace& place, int lane) {
  MbarrierTable& table = table_of(*place.cta);
  const auto entry = table.find(place.offset);
  if (entry == table.end()) {
    report(warp, instr, lane, FindingKind::kUninitialised,
           "no mbarrier.init has been executed at this address");
    return nullptr;
  }
  uint64_t word = 0;
  std::memcpy(&word, place.cta->shared + place.offset, sizeof word);
  if (word != entry->second.encode()) {
    report(warp, instr, lane, FindingKind::kOther,
           "the mbarrier has been overwritten by an ordinary store or copy");
    write_word(entry->second, place);
  }
  return &entry->second;
}

void BulkLoad::move() const {
  for (const CopyUnit& unit : units) {
    if (unit.skip) continue;
    std::byte* const to = target->shared + unit.shared;
    if (unit.begin == 0 && unit.end == kUnitBytes) {
      std::memcpy(to, unit.host, kUnitBytes);
      continue;
    }
    std::memcpy(to, fill, kUnitBytes);
    if (unit.begin < unit.end)
      std::memcpy(to + unit.begin, unit.host + unit.begin, unit.end - unit.begin);
  }
}

void complete_transactions(Mbarrier& barrier, const MbarrierPlace& place, int64_t bytes) {
  barrier.transactions -= bytes;
  settle(barrier, place);
}

void land(Mbarrier& barrier, const MbarrierPlace& place, std::size_t which) {
  const auto at = barrier.in_flight.begin() + std::ptrdiff_t(which);
  std::unique_ptr<BulkLoad> load = std::move(*at);
  barrier.in_flight.erase(at);
  load->move();
  const auto bytes = int64_t(load->bytes);
  barrier.landed.push_back(std::move(load));
  complete_transactions(barrier, place, bytes);
}

bool moves_early(Warp& warp) {
  const Options& options = warp.cta->launch->options;
  if (options.async_timing != AsyncTiming::kRandom)
    return options.async_timing == AsyncTiming::kEarly;
  uint64_t hash =
      options.seed * 0x9e3779b97f4a7c15u + warp.uid * 0xbf58476d1ce4e5b9u + ++async_of(warp).issued;
  hash = (hash ^ (hash >> 31)) * 0x94d049bb133111ebu;
  return (hash >> 60 & 1) != 0;
}

const OpcodeFamily kMbarrierFamily{"mbarrier", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
