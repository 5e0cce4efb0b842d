#include "simulator/check/counters.h"

#include <algorithm>
#include <cctype>
#include <string_view>

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

// 32 banks of 4 bytes. A warp's access takes a wavefront for every distinct word that its most asked-for bank must
// deliver; lanes that read the same word share it. Accesses of 8 bytes a lane go by half warps, of 16 by
// quarter warps, which is their ideal.
Wavefronts bank_wavefronts(const uint64_t* address, uint32_t bytes, LaneMask lanes) {
  const uint32_t unit = bytes <= 4 ? 4 : (bytes >= 16 ? 16 : bytes);
  const uint32_t units = 128 / unit;  // that the banks deliver at a time: also the lanes of a phase
  const uint32_t steps = bytes > unit ? bytes / unit : 1;
  Wavefronts result;
  for (uint32_t step = 0; step < steps; ++step) {
    for (uint32_t first = 0; first < kLanes; first += units) {
      LaneMask left = lanes >> first;
      if (units < 32) left &= (LaneMask{1} << units) - 1;
      if (left == 0) continue;
      // Rows of 128 bytes that each group of banks delivers; more than one is rare.
      uint64_t row[32];
      uint32_t used = 0;
      uint64_t second[kLanes];
      uint32_t num_second = 0;
      for (; left != 0; left &= left - 1) {
        const uint64_t at = address[first + std::countr_zero(left)] + uint64_t{step} * unit;
        const uint32_t bank = static_cast<uint32_t>(at / unit % units);
        if ((used >> bank & 1) == 0) {
          used |= 1u << bank;
          row[bank] = at >> 7;
        } else if (row[bank] != at >> 7) {
          second[num_second++] = at / unit;
        }
      }
      uint64_t most = 1;
      if (num_second > 0) {
        std::sort(second, second + num_second);
        num_second = static_cast<uint32_t>(std::unique(second, second + num_second) - second);
        uint32_t per_bank[32] = {};
        for (uint32_t i = 0; i < num_second; ++i) {
          most = std::max<uint64_t>(most, 1 + ++per_bank[second[i] % units]);
        }
      }
      result.done += most;
      result.ideal += 1;
    }
  }
  return result;
}

uint32_t count_sectors(const uint64_t* address, uint32_t bytes, LaneMask lanes) {
  // Lanes mostly go upwards, so a new sector is mostly behind the last one.
  uint64_t seen[2 * kLanes];
  uint32_t count = 0;
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const uint64_t at = address[std::countr_zero(left)];
    for (uint64_t sector = at / 32; sector <= (at + bytes - 1) / 32; ++sector) {
      if (count > 0 && sector == seen[count - 1]) continue;
      if (count > 0 && sector < seen[count - 1]) {
        const uint64_t* at_or_behind = std::lower_bound(seen, seen + count, sector);
        if (*at_or_behind == sector) continue;
        const auto index = static_cast<uint32_t>(at_or_behind - seen);
        std::copy_backward(seen + index, seen + count, seen + count + 1);
        seen[index] = sector;
        ++count;
        continue;
      }
      seen[count++] = sector;
    }
  }
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

// 2 m n k of "mma.sync.aligned.m16n8k16..."; 0 where the text has no shape. Of a sparse one k counts as it is written.
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
      for (++next; next < text.size() && std::isdigit(static_cast<unsigned char>(text[next])); ++next) {
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
      out.conflicts.push_back({source_of(program, static_cast<uint32_t>(i)), program.texts[i], at.done, at.ideal});
    }
  }
  std::stable_sort(out.conflicts.begin(), out.conflicts.end(), [](const auto& a, const auto& b) {
    return a.wavefronts - a.ideal_wavefronts > b.wavefronts - b.ideal_wavefronts;
  });
  return out;
}

}  // namespace fused_peft::sim
