#include "simulator/check/counters.h"

#include <algorithm>
#include <cctype>
#include <string_view>

#include "simulator/check/bits.h"
#include "simulator/check/state.h"

namespace fused_peft::sim {

const char* name_of(InstrClass kind) {
  switch (kind) {
    case InstrClass::kInteger: return "integer";
    case InstrClass::kFloat: return "float";
    case InstrClass::kHalf: return "half";
    case InstrClass::kConvert: return "convert";
    case InstrClass::kMove: return "move";
    case InstrClass::kPredicate: return "predicate";
    case InstrClass::kBranch: return "branch";
    case InstrClass::kLoad: return "load";
    case InstrClass::kStore: return "store";
    case InstrClass::kAtomic: return "atomic";
    case InstrClass::kSharedLoad: return "shared_load";
    case InstrClass::kSharedStore: return "shared_store";
    case InstrClass::kMatrixLoad: return "matrix_load";
    case InstrClass::kTensor: return "tensor";
    case InstrClass::kAsyncCopy: return "async_copy";
    case InstrClass::kBarrier: return "barrier";
    case InstrClass::kFence: return "fence";
    case InstrClass::kWarp: return "warp";
    case InstrClass::kMath: return "math";
    case InstrClass::kOther:
    case InstrClass::kCount: break;
  }
  return "other";
}

namespace {

// Whether the lanes of each phase ask every bank once: then a phase is one wavefront.
template <uint32_t kUnit>
bool conflict_free(const uint64_t* address) {
  constexpr uint32_t kUnits = 128 / kUnit;
  uint32_t missing = 0;
  for (uint32_t first = 0; first < kLanes; first += kUnits) {
    uint32_t used = 0;
    for (uint32_t lane = first; lane < first + kUnits; ++lane) {
      used |= 1u << (static_cast<uint32_t>(address[lane]) / kUnit % kUnits);
    }
    missing |= ~used;
  }
  return (missing & static_cast<uint32_t>(~uint64_t{0} >> (64 - kUnits))) == 0;
}

// Wavefronts of the lanes [first, first + units) that ask for `unit` bytes each, `offset` behind
// their addresses.
uint64_t phase_wavefronts(const uint64_t* address, LaneMask left, uint32_t unit, uint32_t offset) {
  const uint32_t units = 128 / unit;
  // Rows of 128 bytes that the banks deliver; a second one is rare.
  uint64_t row[32];
  uint32_t used = 0;
  uint64_t second[kLanes];
  uint32_t num_second = 0;
  for (; left != 0; left &= left - 1) {
    const uint64_t at = address[std::countr_zero(left)] + offset;
    const auto bank = static_cast<uint32_t>(at / unit % units);
    if ((used >> bank & 1) == 0) {
      used |= 1u << bank;
      row[bank] = at >> 7;
    } else if (row[bank] != at >> 7) {
      second[num_second++] = at / unit;
    }
  }
  uint64_t most = 1;
  std::sort(second, second + num_second);
  num_second = static_cast<uint32_t>(std::unique(second, second + num_second) - second);
  uint32_t per_bank[32] = {};
  for (uint32_t i = 0; i < num_second; ++i) {
    most = std::max<uint64_t>(most, 1 + ++per_bank[second[i] % units]);
  }
  return most;
}

}  // namespace

// 32 banks of 4 bytes. A warp's access takes a wavefront for every distinct word that its most
// asked-for bank must deliver; lanes that read the same word share it. Accesses of 8 bytes a lane
// go by half warps, of 16 by quarter warps, which is their ideal.
Wavefronts bank_wavefronts(const uint64_t* address, uint32_t bytes, LaneMask lanes) {
  if (lanes == kFullMask) {
    if (bytes == 16 && conflict_free<16>(address)) return {4, 4};
    if (bytes == 8 && conflict_free<8>(address)) return {2, 2};
    if (bytes == 4 && conflict_free<4>(address)) return {1, 1};
  }
  const uint32_t unit = bytes <= 4 ? 4 : (bytes >= 16 ? 16 : bytes);
  const uint32_t units = 128 / unit;  // lanes of a phase
  Wavefronts result;
  for (uint32_t offset = 0; offset < bytes; offset += unit) {
    for (uint32_t first = 0; first < kLanes; first += units) {
      const LaneMask phase = lanes & static_cast<LaneMask>(ones(first, units));
      if (phase == 0) continue;
      result.done += phase_wavefronts(address, phase, unit, offset);
      result.ideal += 1;
    }
  }
  return result;
}

uint32_t count_sectors(const Runs& runs) {
  // Ranges mostly go upwards, so a range mostly starts behind all sectors that have been counted.
  uint32_t count = 0;
  uint64_t first[kLanes], last[kLanes];  // sectors of disjoint ranges, upwards
  int known = 0;
  for (int i = 0; i < runs.count; ++i) {
    uint64_t from = runs.run[i].begin / 32;
    uint64_t to = (runs.run[i].end() - 1) / 32;
    int at = known;
    while (at > 0 && first[at - 1] > from) --at;
    if (at > 0 && last[at - 1] >= from) from = first[--at];
    // Joins all that it meets.
    int end = at;
    for (; end < known && first[end] <= to; ++end) to = std::max(to, last[end]);
    const int removed = end - at;
    if (removed == 0) {
      std::copy_backward(first + at, first + known, first + known + 1);
      std::copy_backward(last + at, last + known, last + known + 1);
    } else if (removed > 1) {
      std::copy(first + end, first + known, first + at + 1);
      std::copy(last + end, last + known, last + at + 1);
    }
    known += 1 - removed;
    first[at] = from;
    last[at] = to;
  }
  for (int i = 0; i < known; ++i) count += static_cast<uint32_t>(last[i] - first[i] + 1);
  return count;
}

void Tally::add(const Tally& other) {
  global_load_bytes += other.global_load_bytes;
  global_store_bytes += other.global_store_bytes;
  global_atomic_bytes += other.global_atomic_bytes;
  global_load_sectors += other.global_load_sectors;
  global_store_sectors += other.global_store_sectors;
  shared_load_bytes += other.shared_load_bytes;
  shared_store_bytes += other.shared_store_bytes;
  local_load_bytes += other.local_load_bytes;
  local_store_bytes += other.local_store_bytes;
  barriers += other.barriers;
  wavefronts.resize(std::max(wavefronts.size(), other.wavefronts.size()));
  for (size_t i = 0; i < other.wavefronts.size(); ++i) {
    wavefronts[i].done += other.wavefronts[i].done;
    wavefronts[i].ideal += other.wavefronts[i].ideal;
  }
}

namespace {

// 2 m n k of "mma.sync.aligned.m16n8k16..."; 0 where the text has no shape. Of a sparse one k
// counts as it is written.
uint64_t flop_of(std::string_view text) {
  for (size_t at = text.find(".m"); at != std::string_view::npos; at = text.find(".m", at + 1)) {
    uint64_t flop = 2;
    size_t next = at + 1;
    for (const char letter : {'m', 'n', 'k'}) {
      if (next >= text.size() || text[next] != letter) {
        flop = 0;
        break;
      }
      uint64_t size = 0;
      for (++next; next < text.size() && std::isdigit(static_cast<unsigned char>(text[next]));
           ++next) {
        size = size * 10 + static_cast<uint64_t>(text[next] - '0');
      }
      flop *= size;
    }
    if (flop != 0) return flop;
  }
  return 0;
}

uint64_t popcount(const uint64_t* words, size_t count) {
  uint64_t bits = 0;
  for (size_t i = 0; i < count; ++i) bits += static_cast<uint64_t>(std::popcount(words[i]));
  return bits;
}

}  // namespace

Counters Checker::counters() const {
  const Launch& launch = state_->launch;
  const Program& program = *launch.program;
  const Tally& tally = state_->tally;
  Counters out;
  out.kernel = program.name;
  out.global_load_bytes = tally.global_load_bytes;
  out.global_store_bytes = tally.global_store_bytes;
  out.global_atomic_bytes = tally.global_atomic_bytes;
  out.global_load_sectors = tally.global_load_sectors;
  out.global_store_sectors = tally.global_store_sectors;
  out.shared_load_bytes = tally.shared_load_bytes;
  out.shared_store_bytes = tally.shared_store_bytes;
  out.local_load_bytes = tally.local_load_bytes;
  out.local_store_bytes = tally.local_store_bytes;
  out.barriers = tally.barriers;
  for (size_t i = 0; i < program.code.size() && i < launch.executed.size(); ++i) {
    const InstrClass kind = program.code[i].kind;
    out.warp_instructions += launch.executed[i];
    out.by_class[static_cast<size_t>(kind)] += launch.executed[i];
    if (i < launch.executed_lanes.size()) out.thread_instructions += launch.executed_lanes[i];
    if (kind == InstrClass::kTensor && launch.executed[i] > 0) {
      // A wgmma is executed by each of the four warps of its warpgroup, for a quarter of its rows.
      const std::string_view text = program.texts[i];
      const bool warpgroup = text.find("wgmma") != std::string_view::npos;
      out.tensor_flop += flop_of(text) * launch.executed[i] / (warpgroup ? 4 : 1);
    }
  }
  for (const auto& shadow : state_->shadows) {
    for (const auto& page : shadow->made) {
      out.global_unique_load_bytes += popcount(page->loaded, kPageBytes / 64);
      out.global_unique_store_bytes += popcount(page->stored, kPageBytes / 64);
    }
  }
  for (size_t i = 0; i < tally.wavefronts.size(); ++i) {
    const Wavefronts& at = tally.wavefronts[i];
    out.shared_wavefronts += at.done;
    out.shared_ideal_wavefronts += at.ideal;
    if (at.done > at.ideal) {
      out.conflicts.push_back(
          {source_of(program, static_cast<uint32_t>(i)), program.texts[i], at.done, at.ideal});
    }
  }
  std::stable_sort(out.conflicts.begin(), out.conflicts.end(), [](const auto& a, const auto& b) {
    return a.wavefronts - a.ideal_wavefronts > b.wavefronts - b.ideal_wavefronts;
  });
  return out;
}

}  // namespace fused_peft::sim
