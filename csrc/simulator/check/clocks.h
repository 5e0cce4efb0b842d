// What warps know of one another: vector clocks, dense inside a cluster, sparse across clusters.
//
// A warp's own clock counts the times it has let others see what it did (a barrier, a release, a
// fence). An access is stamped with it; it happened before a warp's present if that warp knows the
// clock of the one that made it.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fused_peft::sim {

// Knowledge of one CTA of the grid: every warp of it up to `base`, some further.
struct CtaKnowledge {
  uint64_t cta = 0;
  uint32_t base = 0;
  std::vector<std::pair<uint32_t, uint32_t>> above;  // warp, clock > base; sorted by warp

  uint32_t of(uint32_t warp) const;
};

// Knowledge of any CTAs, sorted by cta. Shared between warps, so never changed.
using Knowledge = std::vector<CtaKnowledge>;
using KnowledgePtr = std::shared_ptr<const Knowledge>;

// Everything that either knows.
KnowledgePtr join(const KnowledgePtr& a, const KnowledgePtr& b);

// The warps of one cluster (or of a CTA without one) among themselves.
struct ClusterClocks {
  uint64_t id = 0;  // in the launch, from 1
  uint32_t warps_per_cta = 0;
  std::vector<uint64_t> ctas;  // linear index of each rank

  uint32_t size() const { return warps_per_cta * static_cast<uint32_t>(ctas.size()); }
  int rank_of(uint64_t cta) const;  // -1: not of this cluster
};

struct WarpClock {
  ClusterClocks* cluster = nullptr;
  uint64_t cta = 0;
  uint32_t self = 0;  // rank * warps_per_cta + index
  uint32_t now = 1;
  std::vector<uint32_t> known;  // of the cluster's warps; of itself too, kept at `now`
  KnowledgePtr others;          // of CTAs outside
  // What the last fence covers: for observers anywhere, and for those of this cluster.
  KnowledgePtr fenced, fenced_near;
  // What relaxed loads have met and a fence or barrier will make known.
  KnowledgePtr pending;

  bool knows_near(uint32_t index, uint32_t clock) const { return known[index] >= clock; }
  bool knows(uint64_t cta_index, uint32_t warp, uint32_t clock) const;
  void tick() { known[self] = ++now; }
  void learn(const Knowledge& knowledge);
  void learn_pending();
  KnowledgePtr everything() const;
};

// Knowledge in a synchronisation variable of one cluster.
struct SyncClock {
  std::vector<uint32_t> known;
  KnowledgePtr others, fenced;
  KnowledgePtr from_fences;  // of relaxed arrivals, their own cluster's warps included
};

void release(WarpClock& warp, SyncClock& variable);
void acquire(WarpClock& warp, const SyncClock& variable);

// Knowledge left in words of memory, by address.
class WordClocks {
 public:
  struct Word {
    KnowledgePtr anywhere;
    KnowledgePtr near;     // for observers of the cluster that left it
    uint64_t cluster = 0;  // its id
  };
  bool empty() const { return words_.empty(); }
  void publish(uint64_t address, const WarpClock& warp, const KnowledgePtr& anywhere,
               const KnowledgePtr& near);
  KnowledgePtr read(uint64_t address, const WarpClock& warp) const;

 private:
  std::unordered_map<uint64_t, Word> words_;
};

}  // namespace fused_peft::sim
