// Happens-before: barriers, synchronisation variables, fences and words of memory.
#include <algorithm>

#include "simulator/check/state.h"

namespace fused_peft::sim {

void Checker::release(Warp& warp, SyncVar& variable) {
  if (!state_->racecheck) return;
  if (variable.clock == nullptr) variable.clock = new SyncClock;
  sim::release(state_of(warp).clock, *static_cast<SyncClock*>(variable.clock));
}

void Checker::acquire(Warp& warp, const SyncVar& variable) {
  if (!state_->racecheck || variable.clock == nullptr) return;
  state_of(warp).lane_stores.count = 0;  // lanes of one warp meet at an mbarrier too
  WarpClock& clock = state_of(warp).clock;
  clock.learn_pending();
  sim::acquire(clock, *static_cast<const SyncClock*>(variable.clock));
}

void Checker::release_fenced(Warp& warp, SyncVar& variable) {
  const KnowledgePtr& fenced = state_of(warp).clock.fenced_near;
  if (!state_->racecheck || fenced == nullptr) return;
  if (variable.clock == nullptr) variable.clock = new SyncClock;
  auto& clock = *static_cast<SyncClock*>(variable.clock);
  clock.from_fences = join(clock.from_fences, fenced);
}

void Checker::drop(SyncVar& variable) {
  delete static_cast<SyncClock*>(variable.clock);
  variable.clock = nullptr;
}

namespace {

// Every warp of one CTA that has no cluster: afterwards all clocks are equal and all warps know of
// all others what lies before.
void rendezvous_cta(Cta& cta) {
  uint32_t latest = 0;
  KnowledgePtr others, fenced, fenced_near;
  for (Warp& warp : cta.warps) {
    WarpClock& clock = state_of(warp).clock;
    clock.learn_pending();
    latest = std::max(latest, clock.now);
    others = join(others, clock.others);
    fenced = join(fenced, clock.fenced);
    fenced_near = join(fenced_near, clock.fenced_near);
  }
  for (Warp& warp : cta.warps) {
    WarpClock& clock = state_of(warp).clock;
    std::fill(clock.known.begin(), clock.known.end(), latest);
    clock.now = latest + 1;
    clock.known[clock.self] = clock.now;
    clock.others = others;
    clock.fenced = fenced;
    clock.fenced_near = fenced_near;
  }
}

void rendezvous_some(std::span<Warp* const> warps) {
  SyncClock meeting;
  KnowledgePtr near;
  for (Warp* warp : warps) {
    WarpClock& clock = state_of(*warp).clock;
    clock.learn_pending();
    sim::release(clock, meeting);
    near = join(near, clock.fenced_near);
  }
  for (Warp* warp : warps) {
    WarpClock& clock = state_of(*warp).clock;
    sim::acquire(clock, meeting);
    clock.fenced_near = near;
  }
}

}  // namespace

void Checker::rendezvous(std::span<Warp* const> warps) {
  if (warps.empty()) return;
  Cta& cta = *warps.front()->cta;
  uint32_t here = 0;
  bool one_cta = true;
  for (const Warp* warp : warps) {
    if (warp->cta == &cta) ++here;
    one_cta = one_cta && warp->cta == &cta;
  }
  for (Warp* warp : warps) state_of(*warp).lane_stores.count = 0;
  if (!state_->racecheck) return;
  uint32_t alive = 0;
  for (const Warp& warp : cta.warps) alive += warp.done() ? 0 : 1;
  const bool everyone = here >= alive;
  if (everyone && one_cta && cta.cluster->ctas.size() == 1) {
    rendezvous_cta(cta);
    ++state_of(cta).interval;
    return;
  }
  if (everyone && one_cta) {
    // What warps that have exited did lies before a barrier of all.
    std::vector<Warp*> all;
    for (Warp& warp : cta.warps) all.push_back(&warp);
    rendezvous_some(all);
    ++state_of(cta).interval;
    return;
  }
  rendezvous_some(warps);
}

void Checker::synchronised_lanes(Warp& warp, LaneMask lanes) {
  state_of(warp).lane_stores.synchronise(lanes);
}

void Checker::fence(Warp& warp, Scope scope) {
  if (!state_->racecheck) return;
  state_of(warp).lane_stores.count = 0;
  WarpClock& clock = state_of(warp).clock;
  clock.learn_pending();
  const KnowledgePtr all = clock.everything();
  clock.fenced_near = all;
  if (scope == Scope::kDevice || scope == Scope::kSystem) clock.fenced = all;
  clock.tick();
}

void Checker::proxy_fence(Warp& warp) {
  if (!state_->racecheck) return;
  WarpClock& clock = state_of(warp).clock;
  clock.learn_pending();
  std::vector<uint32_t>& proxied = state_of(*warp.cta).cluster->proxied;
  for (size_t i = 0; i < proxied.size(); ++i) proxied[i] = std::max(proxied[i], clock.known[i]);
  clock.tick();
}

namespace {

uint64_t key_of(Warp& warp, Space space, uint64_t address) {
  return reinterpret_cast<uint64_t>(Checker::resolve(warp, space, address, 0));
}

CtaState& owner_of(Warp& warp, uint64_t address) {
  const uint64_t rank = address >> kSharedRankShift;
  if (rank == 0) return state_of(*warp.cta);
  return state_of(*warp.cta->cluster->ctas[rank - 1]);
}

}  // namespace

void Checker::release_at(Warp& warp, Space space, uint64_t address, Scope scope, bool strong) {
  if (!state_->racecheck) return;
  WarpClock& clock = state_of(warp).clock;
  if (!strong && clock.fenced_near == nullptr && clock.fenced == nullptr) return;
  const bool far = scope == Scope::kDevice || scope == Scope::kSystem;
  KnowledgePtr anywhere = far ? clock.fenced : nullptr;
  KnowledgePtr near = clock.fenced_near;
  if (strong) {
    near = clock.everything();
    if (far) anywhere = near;
    clock.tick();
  }
  if (space == Space::kShared) {
    owner_of(warp, address).words.publish(key_of(warp, space, address), clock, anywhere, near);
    return;
  }
  std::lock_guard hold(state_->words_mutex);
  state_->words.publish(address, clock, anywhere, near);
  state_->words_used.store(true, std::memory_order_relaxed);
}

void Checker::acquire_at(Warp& warp, Space space, uint64_t address, Scope, bool strong) {
  if (!state_->racecheck) return;
  WarpClock& clock = state_of(warp).clock;
  KnowledgePtr met;
  if (space == Space::kShared) {
    const WordClocks& words = owner_of(warp, address).words;
    if (words.empty()) return;
    met = words.read(key_of(warp, space, address), clock);
  } else {
    if (!state_->words_used.load(std::memory_order_relaxed)) return;
    std::lock_guard hold(state_->words_mutex);
    met = state_->words.read(address, clock);
  }
  if (met == nullptr) return;
  if (strong) {
    clock.learn(*met);
  } else {
    clock.pending = join(clock.pending, met);
  }
}

}  // namespace fused_peft::sim
