#include "simulator/check/clocks.h"

#include <algorithm>

namespace fused_peft::sim {

uint32_t CtaKnowledge::of(uint32_t warp) const {
  for (const auto& [index, clock] : above) {
    if (index == warp) return clock;
  }
  return base;
}

namespace {

CtaKnowledge join_cta(const CtaKnowledge& a, const CtaKnowledge& b) {
  CtaKnowledge joined{a.cta, std::max(a.base, b.base), {}};
  auto left = a.above.begin();
  auto right = b.above.begin();
  while (left != a.above.end() || right != b.above.end()) {
    std::pair<uint32_t, uint32_t> next;
    if (right == b.above.end() || (left != a.above.end() && left->first < right->first)) {
      next = *left++;
    } else if (left == a.above.end() || right->first < left->first) {
      next = *right++;
    } else {
      next = {left->first, std::max(left->second, right->second)};
      ++left;
      ++right;
    }
    if (next.second > joined.base) joined.above.push_back(next);
  }
  return joined;
}

const CtaKnowledge* find_cta(const Knowledge& knowledge, uint64_t cta) {
  const auto found =
      std::lower_bound(knowledge.begin(), knowledge.end(), cta,
                       [](const CtaKnowledge& entry, uint64_t key) { return entry.cta < key; });
  return found != knowledge.end() && found->cta == cta ? &*found : nullptr;
}

}  // namespace

KnowledgePtr join(const KnowledgePtr& a, const KnowledgePtr& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  auto joined = std::make_shared<Knowledge>();
  joined->reserve(a->size() + b->size());
  auto left = a->begin();
  auto right = b->begin();
  while (left != a->end() || right != b->end()) {
    if (right == b->end() || (left != a->end() && left->cta < right->cta)) {
      joined->push_back(*left++);
    } else if (left == a->end() || right->cta < left->cta) {
      joined->push_back(*right++);
    } else {
      joined->push_back(join_cta(*left++, *right++));
    }
  }
  return joined;
}

int ClusterClocks::rank_of(uint64_t cta) const {
  for (size_t rank = 0; rank < ctas.size(); ++rank) {
    if (ctas[rank] == cta) return static_cast<int>(rank);
  }
  return -1;
}

bool WarpClock::knows(uint64_t cta_index, uint32_t warp, uint32_t clock) const {
  const int rank = cta_index == cta ? static_cast<int>(self / cluster->warps_per_cta)
                                    : cluster->rank_of(cta_index);
  if (rank >= 0) return known[rank * cluster->warps_per_cta + warp] >= clock;
  if (others == nullptr) return false;
  const CtaKnowledge* entry = find_cta(*others, cta_index);
  return entry != nullptr && (entry->base >= clock || entry->of(warp) >= clock);
}

void WarpClock::learn(const Knowledge& knowledge) {
  std::shared_ptr<Knowledge> outside;
  for (const CtaKnowledge& entry : knowledge) {
    const int rank = cluster->rank_of(entry.cta);
    if (rank < 0) {
      if (outside == nullptr) outside = std::make_shared<Knowledge>();
      outside->push_back(entry);
      continue;
    }
    uint32_t* row = known.data() + rank * cluster->warps_per_cta;
    for (uint32_t warp = 0; warp < cluster->warps_per_cta; ++warp) {
      row[warp] = std::max(row[warp], entry.base);
    }
    for (const auto& [warp, clock] : entry.above) row[warp] = std::max(row[warp], clock);
  }
  if (outside != nullptr) others = join(others, outside);
  known[self] = now;
}

void WarpClock::learn_pending() {
  if (pending == nullptr) return;
  learn(*pending);
  pending = nullptr;
}

KnowledgePtr WarpClock::everything() const {
  auto mine = std::make_shared<Knowledge>();
  for (size_t rank = 0; rank < cluster->ctas.size(); ++rank) {
    const uint32_t* row = known.data() + rank * cluster->warps_per_cta;
    CtaKnowledge entry{
        cluster->ctas[rank], *std::min_element(row, row + cluster->warps_per_cta), {}};
    for (uint32_t warp = 0; warp < cluster->warps_per_cta; ++warp) {
      if (row[warp] > entry.base) entry.above.emplace_back(warp, row[warp]);
    }
    mine->push_back(std::move(entry));
  }
  std::sort(mine->begin(), mine->end(),
            [](const CtaKnowledge& a, const CtaKnowledge& b) { return a.cta < b.cta; });
  return join(mine, others);
}

void release(WarpClock& warp, SyncClock& variable) {
  variable.known.resize(warp.known.size());
  for (size_t i = 0; i < warp.known.size(); ++i) {
    variable.known[i] = std::max(variable.known[i], warp.known[i]);
  }
  variable.others = join(variable.others, warp.others);
  variable.fenced = join(variable.fenced, warp.fenced);
  warp.tick();
}

void acquire(WarpClock& warp, const SyncClock& variable) {
  for (size_t i = 0; i < variable.known.size(); ++i) {
    warp.known[i] = std::max(warp.known[i], variable.known[i]);
  }
  warp.others = join(warp.others, variable.others);
  warp.fenced = join(warp.fenced, variable.fenced);
  warp.known[warp.self] = warp.now;
  if (variable.from_fences != nullptr) warp.learn(*variable.from_fences);
}

void WordClocks::publish(uint64_t address, const WarpClock& warp, const KnowledgePtr& anywhere,
                         const KnowledgePtr& near) {
  Word& word = words_[address];
  word.anywhere = join(word.anywhere, anywhere);
  if (word.cluster != warp.cluster->id) word.near = nullptr;
  word.cluster = warp.cluster->id;
  word.near = join(word.near, near);
}

KnowledgePtr WordClocks::read(uint64_t address, const WarpClock& warp) const {
  const auto found = words_.find(address);
  if (found == words_.end()) return nullptr;
  const Word& word = found->second;
  return word.cluster == warp.cluster->id ? join(word.anywhere, word.near) : word.anywhere;
}

}  // namespace fused_peft::sim
