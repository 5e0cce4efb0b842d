#include "simulator/check/race.h"

#include <algorithm>

namespace fused_peft::sim {

namespace {

constexpr size_t kMostStamps = 64;  // of one crowded cell

uint32_t draw(const Stamp& now) {
  const uint32_t mixed = (now.who * 0x9e3779b9u) ^ (now.clock * 0x85ebca6bu) ^ now.what;
  return (mixed * 0xc2b2ae35u) >> 16;
}

}  // namespace

bool replace_reader(Stamp* slots, int count, const Stamp& now) {
  if ((now.kind() & kWriteStamp) != 0) return false;
  int readers[8];
  uint32_t found = 0;
  for (int i = 0; i < count; ++i) {
    if ((slots[i].kind() & kWriteStamp) == 0 && (now.mask & ~slots[i].mask) == 0)
      readers[found++] = i;
  }
  if (found < 2) return false;
  slots[readers[draw(now) % found]] = now;
  return true;
}

void add_stamp(std::vector<Stamp>& more, const Stamp& now) {
  std::erase_if(more, [](const Stamp& stamp) { return stamp.mask == 0; });
  if (more.size() < kMostStamps) {
    more.push_back(now);
  } else {
    more[draw(now) % kMostStamps] = now;
  }
}

}  // namespace fused_peft::sim
