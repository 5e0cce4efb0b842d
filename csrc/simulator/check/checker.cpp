#include "simulator/check/checker.h"

#include <algorithm>
#include <cstdio>

#include "simulator/check/bits.h"
#include "simulator/check/state.h"

namespace fused_peft::sim {

const char* name_of(FindingKind kind) {
  switch (kind) {
    case FindingKind::kOutOfBounds: return "out of bounds";
    case FindingKind::kMisaligned: return "misaligned";
    case FindingKind::kUninitialised: return "uninitialised";
    case FindingKind::kRace: return "race";
    case FindingKind::kDivergentBarrier: return "divergent barrier";
    case FindingKind::kBarrierCount: return "barrier count";
    case FindingKind::kAsyncNotWaited: return "asynchronous copy not waited for";
    case FindingKind::kProxyFence: return "missing proxy fence";
    case FindingKind::kLeak: return "leak";
    case FindingKind::kOther: return "other";
  }
  return "other";
}

const char* verb(AccessKind kind) {
  switch (kind) {
    case AccessKind::kRead: return "reads";
    case AccessKind::kWrite: return "writes";
    case AccessKind::kAtomic: return "atomic operation on";
  }
  return "touches";
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

namespace {

std::string file_and_line(const Program& program, uint32_t file, uint32_t line) {
  const std::string& path = program.files[file];
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
}

}  // namespace

std::string source_of(const Program& program, uint32_t instr) {
  if (instr >= program.lines.size()) return "";
  const SourceLine& at = program.lines[instr];
  if (at.line == 0 || at.file >= program.files.size()) return "ptx:" + std::to_string(at.ptx_line);
  std::string text = file_and_line(program, at.file, at.line);
  if (at.caller_line != 0 && at.caller_file < program.files.size()) {
    text += ", inlined at " + file_and_line(program, at.caller_file, at.caller_line);
  }
  return text;
}

Checker::State::State(Launch& of)
    : launch(of),
      memcheck(of.options.memcheck),
      initcheck(of.options.initcheck),
      racecheck(of.options.racecheck),
      synccheck(of.options.synccheck),
      used_by(std::make_unique<std::atomic<BufferShadow*>[]>(of.program->code.size() + 1)) {}

Checker::Checker(Launch& launch) : state_(std::make_unique<State>(launch)) {}
Checker::~Checker() = default;

void Checker::start(Cta& cta) {
  State& state = *state_;
  const Launch& launch = state.launch;
  const auto warps = static_cast<uint32_t>(cta.warps.size());
  auto mine = std::make_unique<CtaState>();
  mine->cta = &cta;
  mine->cells.resize((cta.shared_bytes + kCellBytes - 1) / kCellBytes);
  mine->tally.wavefronts.resize(launch.program->code.size());
  std::shared_ptr<ClusterState> shared;
  if (cta.cluster->check != nullptr) {
    shared = *static_cast<std::shared_ptr<ClusterState>*>(cta.cluster->check);
  } else {
    shared = std::make_shared<ClusterState>();
    shared->clocks.warps_per_cta = warps;
    for (const Cta* member : cta.cluster->ctas) shared->clocks.ctas.push_back(member->linear);
    shared->proxied.resize(shared->clocks.size());
    shared->unfinished = static_cast<uint32_t>(shared->clocks.ctas.size());
    cta.cluster->check = new std::shared_ptr<ClusterState>(shared);
    std::lock_guard hold(state.mutex);
    shared->clocks.id = state.next_cluster++;
  }
  mine->cluster = shared;
  for (Warp& warp : cta.warps) {
    auto own = std::make_unique<WarpState>();
    own->clock.cluster = &shared->clocks;
    own->clock.cta = cta.linear;
    own->clock.self = cta.rank * warps + warp.index;
    own->clock.known.assign(shared->clocks.size(), 0);
    own->clock.known[own->clock.self] = own->clock.now;
    own->cta = cta.linear;
    own->global_who = static_cast<uint32_t>(cta.linear << 5 | warp.index);
    if (state.initcheck) {
      own->local_init.resize((uint64_t{launch.program->local_bytes} * kLanes + 63) / 64);
      own->private_init.resize((uint64_t{launch.program->private_bytes} * kLanes + 63) / 64);
    }
    warp.check = own.release();
  }
  cta.check = mine.release();
}

void Checker::finish(Cta& cta) {
  if (cta.check == nullptr) return;
  std::unique_ptr<CtaState> mine(static_cast<CtaState*>(cta.check));
  cta.check = nullptr;
  for (Warp& warp : cta.warps) {
    delete static_cast<WarpState*>(warp.check);
    warp.check = nullptr;
    warp.async = nullptr;
  }
  if (cta.cluster->check != nullptr && --mine->cluster->unfinished == 0) {
    delete static_cast<std::shared_ptr<ClusterState>*>(cta.cluster->check);
    cta.cluster->check = nullptr;
  }
  mine->tally.barriers = cta.barriers_passed;
  std::lock_guard hold(state_->mutex);
  state_->tally.add(mine->tally);
}

LaneMask Checker::access(Warp& warp, const Instr& instr, const Access& access, LaneMask stored,
                         LaneMask* valid) {
  switch (access.space) {
    case Space::kGlobal: return state_->access_global(warp, instr, access, stored, valid);
    case Space::kShared: return state_->access_shared(warp, instr, access, stored, valid, false);
    case Space::kConst: return state_->access_const(warp, instr, access, valid);
    default: return state_->access_private(warp, instr, access, stored, valid);
  }
}

std::byte* Checker::resolve(Warp& warp, Space space, uint64_t address, int lane) {
  switch (space) {
    case Space::kShared: {
      const uint64_t rank = address >> kSharedRankShift;
      const uint64_t offset = address & ((uint64_t{1} << kSharedRankShift) - 1);
      if (rank == 0) return warp.cta->shared + offset;
      return warp.cta->cluster->ctas[rank - 1]->shared + offset;
    }
    case Space::kLocal: return warp.local + uint64_t(lane) * warp.program->local_bytes + address;
    case Space::kParam:
      if (address < kCalleeParam) return warp.cta->launch->config.params.data() + address;
      return warp.private_memory + uint64_t(lane) * warp.program->private_bytes +
             (address - kCalleeParam);
    default: return reinterpret_cast<std::byte*>(address);
  }
}

void Checker::report(const Warp& warp, const Instr& instr, LaneMask lanes, FindingKind kind,
                     const std::string& detail) {
  state_->report(warp, instr, lanes, kind, detail);
}

void Checker::State::report(const Warp& warp, const Instr& instr, LaneMask lanes, FindingKind kind,
                            const std::string& detail) {
  std::lock_guard hold(mutex);
  ++total_findings;
  const auto [entry, fresh] = finding_index.try_emplace({instr.index, kind}, findings.size());
  if (!fresh) {
    if (entry->second < findings.size()) ++findings[entry->second].count;
    return;
  }
  if (findings.size() >= launch.options.max_findings) {
    entry->second = SIZE_MAX;
    return;
  }
  Finding finding;
  finding.kind = kind;
  finding.kernel = launch.program->name;
  finding.block = warp.cta->index;
  const Dim3& block = launch.config.block;
  const uint32_t lane = lanes == 0 ? 0 : static_cast<uint32_t>(std::countr_zero(lanes));
  const uint32_t thread = warp.index * kLanes + lane;
  finding.thread = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
  if (instr.index < launch.program->texts.size()) {
    finding.instruction = launch.program->texts[instr.index];
  }
  finding.source = source_of(*launch.program, instr.index);
  finding.text = std::string(name_of(kind)) + ": " + describe(warp, instr, lanes) + ": " + detail;
  findings.push_back(std::move(finding));
}

void Checker::State::report_race(const Warp& warp, const Instr& instr, LaneMask lanes,
                                 const Access& access, const Stamp& other, bool shared,
                                 uint64_t cell) {
  const uint32_t first = static_cast<uint32_t>(std::countr_zero(other.mask));
  uint64_t cta = warp.cta->linear;
  uint32_t index = other.who & 31;
  if (shared) {
    const ClusterClocks& clocks = *state_of(warp).clock.cluster;
    cta = clocks.ctas[other.who / clocks.warps_per_cta];
    index = other.who % clocks.warps_per_cta;
  } else {
    cta = other.who >> 5;
  }
  const bool write = (other.kind() & kWriteStamp) != 0;
  const bool relaxed = (other.kind() & kRelaxedStamp) != 0;
  const Dim3& grid = launch.config.grid;
  std::string text =
      std::string(verb(access.kind)) + (shared ? " shared" : " global") + " memory at " +
      hex(cell + first) + " with nothing that orders it behind the " +
      (relaxed ? "atomic or volatile " : "") + (write ? "write" : "read") + " by warp " +
      std::to_string(index) + " of block (" + std::to_string(cta % grid.x) + "," +
      std::to_string(cta / grid.x % grid.y) + "," + std::to_string(cta / grid.x / grid.y) + ")";
  if (other.instr() < launch.program->texts.size()) {
    text += ": " + launch.program->texts[other.instr()] + " (" +
            source_of(*launch.program, other.instr()) + ")";
  }
  report(warp, instr, lanes, FindingKind::kRace, text);
}

const std::vector<Finding>& Checker::findings() const { return state_->findings; }
uint64_t Checker::total_findings() const { return state_->total_findings; }

}  // namespace fused_peft::sim
