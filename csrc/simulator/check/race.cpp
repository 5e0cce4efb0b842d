#include "simulator/check/race.h"

#include <algorithm>

namespace fused_peft::sim {

namespace {
constexpr size_t kMostStamps = 64;  // of one crowded cell
}

void crowd(Stamp* slots, int count, std::vector<Stamp>& more, const Stamp& now) {
  std::erase_if(more, [](const Stamp& stamp) { return stamp.mask == 0; });
  const uint32_t draw = (now.who * 0x9e3779b9u) ^ (now.clock * 0x85ebca6bu) ^ now.what;
  if ((now.kind() & kWriteStamp) == 0) {
    int readers[8];
    int found = 0;
    for (int i = 0; i < count; ++i) {
      if ((slots[i].kind() & kWriteStamp) == 0 && (now.mask & ~slots[i].mask) == 0) readers[found++] = i;
    }
    if (found >= 2) {
      slots[readers[(draw >> 16) % static_cast<uint32_t>(found)]] = now;
      return;
    }
  }
  if (more.size() < kMostStamps) {
    more.push_back(now);
  } else {
    more[(draw >> 16) % kMostStamps] = now;
  }
}

}  // namespace fused_peft::sim
