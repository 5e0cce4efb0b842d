// Global and constant memory: bounds against registered buffers, initialisation, races across the
// grid, sectors.
#include <algorithm>

#include "simulator/check/bits.h"
#include "simulator/check/runs.h"
#include "simulator/check/state.h"

namespace fused_peft::sim {

BufferShadow::BufferShadow(std::shared_ptr<Buffer> of)
    : buffer(std::move(of)), first_page(buffer->start / kPageBytes) {
  const uint64_t last = (buffer->start + std::max<uint64_t>(buffer->bytes, 1) - 1) / kPageBytes;
  num_pages = last - first_page + 1;
  pages = std::make_unique<std::atomic<GlobalPage*>[]>(num_pages);
}

GlobalPage& BufferShadow::page(uint64_t address) {
  std::atomic<GlobalPage*>& slot = pages[address / kPageBytes - first_page];
  GlobalPage* page = slot.load(std::memory_order_acquire);
  if (page != nullptr) return *page;
  std::lock_guard hold(lock);
  page = slot.load(std::memory_order_relaxed);
  if (page == nullptr) {
    made.push_back(std::make_unique<GlobalPage>());
    page = made.back().get();
    slot.store(page, std::memory_order_release);
  }
  return *page;
}

BufferShadow* Checker::State::shadow_of(uint64_t address, uint64_t bytes) {
  const ShadowList* list = shadow_list.load(std::memory_order_acquire);
  const auto find = [&](const ShadowList& in) -> BufferShadow* {
    const auto next = std::upper_bound(
        in.begin(), in.end(), address,
        [](uint64_t key, const BufferShadow* shadow) { return key < shadow->buffer->start; });
    for (auto at = next; at != in.begin();) {
      --at;
      if ((*at)->buffer->contains(address, bytes)) return *at;
    }
    return nullptr;
  };
  if (list != nullptr) {
    if (BufferShadow* found = find(*list)) return found;
  }
  std::shared_ptr<Buffer> buffer = MemoryMap::global().buffer_at(address);
  if (buffer == nullptr || !buffer->contains(address, bytes)) return nullptr;
  std::lock_guard hold(shadows_mutex);
  list = shadow_list.load(std::memory_order_relaxed);
  if (list != nullptr) {
    if (BufferShadow* found = find(*list)) return found;
  }
  auto grown = std::make_unique<ShadowList>(list == nullptr ? ShadowList{} : *list);
  shadows.push_back(std::make_unique<BufferShadow>(std::move(buffer)));
  grown->insert(std::upper_bound(grown->begin(), grown->end(), shadows.back().get(),
                                 [](const BufferShadow* a, const BufferShadow* b) {
                                   return a->buffer->start < b->buffer->start;
                                 }),
                shadows.back().get());
  shadow_list.store(grown.get(), std::memory_order_release);
  shadow_lists.push_back(std::move(grown));
  return shadows.back().get();
}

namespace {

std::string where(uint64_t address, uint32_t bytes) {
  const std::shared_ptr<Buffer> below = MemoryMap::global().buffer_below(address);
  std::string text = std::to_string(bytes) + " bytes at " + hex(address);
  if (address < kPageBytes) return text + ", a null pointer";
  if (below != nullptr && address - below->start < below->bytes + (uint64_t{1} << 24)) {
    const uint64_t offset = address - below->start;
    text += offset < below->bytes
                ? ", which reach over the end of "
                : ", " + std::to_string(offset - below->bytes) + " bytes behind the end of ";
    return text + below->name + " (" + std::to_string(below->bytes) + " bytes at " +
           hex(below->start) + ")";
  }
  return text + ", which is in no buffer";
}

}  // namespace

// One access to global memory.
struct GlobalTouch {
  Checker::State& state;
  const Access& access;
  WarpState& me;
  Stamp now;
  Stamp other{};
  uint64_t race_cell = 0;
  bool races = false;
  bool all_init = true;

  // Bytes of one page.
  void touch_page(BufferShadow& shadow, GlobalPage& page, uint64_t begin, uint64_t bytes) {
    const bool concurrent = state.launch.options.threads > 1;
    if (concurrent) page.lock.lock();
    const uint64_t first = begin % kPageBytes;
    if (access.kind != AccessKind::kWrite) {
      set_bits(page.loaded, first, bytes);
      if (!shadow.buffer->all_initialised() && state.initcheck) {
        all_init = all_init && shadow.buffer->initialised(begin, bytes);
      }
    }
    if (access.kind != AccessKind::kRead) set_bits(page.stored, first, bytes);
    if (state.racecheck) {
      if (page.cells == nullptr && access.kind == AccessKind::kRead) {
        list_read(page, first, bytes);
      } else {
        if (page.cells == nullptr) make_cells(page);
        for_cells<kCellBytes>(first, bytes, [&](uint64_t cell, uint32_t mask) {
          touch_cell(page, static_cast<uint32_t>(cell), mask, begin - first);
        });
      }
    }
    if (concurrent) page.lock.unlock();
  }

  void list_read(GlobalPage& page, uint64_t first, uint64_t bytes) {
    constexpr size_t kMostReads = 192;
    if (!page.reads.empty()) {
      const PageRead& last = page.reads.back();
      if (last.who == now.who && last.clock == now.clock && last.begin == first &&
          last.end == first + bytes)
        return;
    }
    if (page.reads.empty()) page.reads.reserve(32);
    const PageRead read{now.who, now.clock, static_cast<uint16_t>(first),
                        static_cast<uint16_t>(first + bytes), now.what};
    if (page.reads.size() < kMostReads) {
      page.reads.push_back(read);
      return;
    }
    const uint32_t draw = (++page.reads_seen * 0x9e3779b9u) >> 16;
    page.reads[draw % kMostReads] = read;
  }

  // The page is about to be written: what has been read becomes stamps.
  static void make_cells(GlobalPage& page) {
    page.cells = std::make_unique<GlobalCell[]>(kPageBytes / kCellBytes);
    for (const PageRead& read : page.reads) {
      for_cells<kCellBytes>(
          read.begin, uint64_t{read.end} - read.begin, [&](uint64_t index, uint32_t mask) {
            const auto cell = static_cast<uint32_t>(index);
            const auto more = [&]() -> std::vector<Stamp>& { return page.crowded[cell]; };
            const auto knows_nobody = [](uint32_t, uint32_t) { return false; };
            Stamp none;
            touch(page.cells[cell].slots, page.crowded.contains(cell),
                  {read.who, read.clock, mask, read.what}, knows_nobody, more, &none);
          });
    }
    page.reads = {};
  }

  void touch_cell(GlobalPage& page, uint32_t cell, uint32_t mask, uint64_t base) {
    now.mask = mask;
    const auto knows = [&](uint32_t who, uint32_t clock) {
      return me.clock.knows(who >> 5, who & 31, clock);
    };
    const auto more = [&]() -> std::vector<Stamp>& { return page.crowded[cell]; };
    const bool crowded = !page.crowded.empty() && page.crowded.contains(cell);
    Stamp met;
    if (touch(page.cells[cell].slots, crowded, now, knows, more, &met) && !races) {
      // Two plain writes of the same value are let pass (see Access::data).
      if (access.kind == AccessKind::kWrite && (met.kind() & kWriteStamp) != 0 &&
          same_value(base + cell * kCellBytes, mask)) {
        return;
      }
      races = true;
      other = met;
      race_cell = base + cell * kCellBytes;
    }
  }

  // Whether what is stored to these bytes of the cell is what they hold.
  bool same_value(uint64_t cell, uint32_t mask) const {
    if (access.data == nullptr) return false;
    for (LaneMask left = access.lanes; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      const uint64_t at = access.address[lane];
      for (uint64_t byte = std::max(at, cell);
           byte < std::min(at + access.bytes, cell + kCellBytes); ++byte) {
        if ((mask >> (byte - cell) & 1) == 0) continue;
        if (*reinterpret_cast<const std::byte*>(byte) !=
            access.data[lane * access.bytes + (byte - at)])
          return false;
      }
    }
    return true;
  }
};

LaneMask Checker::State::aligned_lanes(Warp& warp, const Instr& instr, const Access& access) {
  uint64_t bits = 0;
  const uint32_t align = access.align != 0 ? access.align : access.bytes;
  const uint64_t below = align - 1;
  if (access.lanes == kFullMask) {
    for (int lane = 0; lane < kLanes; ++lane) bits |= access.address[lane];
  } else {
    for (LaneMask left = access.lanes; left != 0; left &= left - 1) {
      bits |= access.address[std::countr_zero(left)];
    }
  }
  if ((bits & below) == 0) [[likely]]
    return access.lanes;
  const LaneMask good = lanes_where(access.address, access.lanes,
                                    [&](uint64_t address) { return (address & below) == 0; });
  const LaneMask bad = access.lanes & ~good;
  if (memcheck) {
    report(warp, instr, bad, FindingKind::kMisaligned,
           std::string(verb(access.kind)) + " " + std::to_string(access.bytes) + " bytes at " +
               hex(access.address[std::countr_zero(bad)]) + ", which is no multiple of " +
               std::to_string(align));
  }
  return good;
}

// Lanes of `left` that are in no buffer: a finding, unless they read the kernel's parameters.
// Returns lanes dealt with, of which *carried are to be carried out.
LaneMask Checker::State::access_elsewhere(Warp& warp, const Instr& instr, const Access& access,
                                          LaneMask left, LaneMask* carried) {
  const LaneMask first = left & -left;
  const uint64_t at = access.address[std::countr_zero(left)];
  if (!memcheck || (access.kind == AccessKind::kRead && in_params(at, access.bytes))) {
    *carried |= first;
    return first;
  }
  const LaneMask bad = lanes_where(access.address, left, [&](uint64_t address) {
    return shadow_of(address, access.bytes) == nullptr && !in_params(address, access.bytes);
  });
  report(warp, instr, bad | first, FindingKind::kOutOfBounds,
         std::string(verb(access.kind)) + " " + where(at, access.bytes));
  return bad | first;
}

// The lanes of an access that lie in one buffer; returns those whose bytes were all initialised.
LaneMask Checker::State::access_buffer(BufferShadow& shadow, const Runs& runs, const Access& access,
                                       LaneMask lanes, GlobalTouch& touch) {
  touch.all_init = true;
  // The pages of all ranges are on their way to the cache before the first is needed.
  GlobalPage* pages[kLanes];
  for (int i = 0; i < runs.count; ++i) {
    const uint64_t at = runs.run[i].begin;
    pages[i] = &shadow.page(at);
    pages[i]->prefetch(at % kPageBytes, access.kind);
  }
  for (int i = 0; i < runs.count; ++i) {
    const Run& run = runs.run[i];
    GlobalPage* page = pages[i];
    for (uint64_t at = run.begin; at < run.end();) {
      const uint64_t end = std::min(run.end(), (at / kPageBytes + 1) * kPageBytes);
      touch.touch_page(shadow, *page, at, end - at);
      at = end;
      if (at < run.end()) page = &shadow.page(at);
    }
  }
  Buffer& buffer = *shadow.buffer;
  LaneMask initialised = lanes;
  if (!touch.all_init) {
    initialised = lanes_where(access.address, lanes, [&](uint64_t address) {
      return buffer.initialised(address, access.bytes);
    });
  }
  if (access.kind != AccessKind::kRead && !buffer.all_initialised()) {
    for (int i = 0; i < runs.count; ++i)
      buffer.set_initialised(runs.run[i].begin, runs.run[i].bytes);
  }
  return initialised;
}

LaneMask Checker::State::access_global(Warp& warp, const Instr& instr, const Access& access,
                                       LaneMask stored, LaneMask* valid) {
  LaneMask left = aligned_lanes(warp, instr, access);
  LaneMask carried = 0;
  LaneMask initialised = 0;
  uint32_t sectors = 0;
  WarpState& me = state_of(warp);
  GlobalTouch touch{*this,
                    access,
                    me,
                    {me.global_who, me.clock.now, 0, stamp_what(instr.index, stamp_kind(access))}};
  // Usually once: all lanes in one buffer.
  while (left != 0) {
    const uint64_t first = access.address[std::countr_zero(left)];
    BufferShadow* shadow = used_by[instr.index].load(std::memory_order_acquire);
    if (shadow == nullptr || !shadow->buffer->contains(first, access.bytes)) {
      shadow = shadow_of(first, access.bytes);
      used_by[instr.index].store(shadow, std::memory_order_release);
    }
    if (shadow == nullptr) {
      const LaneMask done = access_elsewhere(warp, instr, access, left, &carried);
      initialised |= done;
      left &= ~done;
      continue;
    }
    const Buffer& buffer = *shadow->buffer;
    const LaneMask inside = lanes_within(access.address, left, buffer.start,
                                         buffer.start + buffer.bytes - access.bytes);
    carried |= inside;
    left &= ~inside;
    const Runs runs(access.address, access.bytes, inside);
    sectors += count_sectors(runs);
    initialised |= access_buffer(*shadow, runs, access, inside, touch);
  }
  if (touch.races) {
    report_race(warp, instr, carried, access, touch.other, false, touch.race_cell);
  }
  if (initcheck && access.kind != AccessKind::kRead && (carried & ~stored) != 0) {
    report(warp, instr, carried & ~stored, FindingKind::kUninitialised,
           "stores a value that was computed from uninitialised data");
  }
  if (initcheck && access.kind == AccessKind::kAtomic && (carried & ~initialised) != 0) {
    report(warp, instr, carried & ~initialised, FindingKind::kUninitialised,
           "atomic operation on uninitialised memory");
  }
  if (valid != nullptr) *valid = initialised | ~carried;  // one finding is enough

  Tally& tally = state_of(*warp.cta).tally;
  const uint64_t bytes = uint64_t{access.bytes} * std::popcount(carried);
  if (access.kind == AccessKind::kAtomic) {
    tally.global_atomic_bytes += bytes;
  } else {
    const bool load = access.kind == AccessKind::kRead;
    (load ? tally.global_load_bytes : tally.global_store_bytes) += bytes;
    (load ? tally.global_load_sectors : tally.global_store_sectors) += sectors;
  }
  return carried;
}

bool Checker::State::in_params(uint64_t address, uint32_t bytes) const {
  const uint64_t offset = address - reinterpret_cast<uint64_t>(launch.config.params.data());
  const uint64_t size = launch.config.params.size();
  return offset < size && bytes <= size - offset;
}

LaneMask Checker::State::access_const(Warp& warp, const Instr& instr, const Access& access,
                                      LaneMask* valid) {
  const LaneMask lanes = aligned_lanes(warp, instr, access);
  LaneMask good = lanes;
  if (memcheck) {
    good = lanes_where(access.address, lanes, [&](uint64_t address) {
      return in_params(address, access.bytes) || shadow_of(address, access.bytes) != nullptr;
    });
    const LaneMask bad = lanes & ~good;
    if (bad != 0) {
      report(warp, instr, bad, FindingKind::kOutOfBounds,
             std::string(verb(access.kind)) + " " +
                 where(access.address[std::countr_zero(bad)], access.bytes));
    }
  }
  if (valid != nullptr) *valid = kFullMask;
  return good;
}

}  // namespace fused_peft::sim
