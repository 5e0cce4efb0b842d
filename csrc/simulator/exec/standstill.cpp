// The report of a deadlock or a hang: which lanes wait for what.
#include <map>
#include <string>
#include <vector>

#include "simulator/exec/barrier.h"
#include "simulator/exec/cluster_barrier.h"
#include "simulator/exec/scheduler.h"

namespace fused_peft::sim {
namespace {

constexpr size_t kMaxLines = 20;

std::string reason_of(const Warp& warp, const Split& split) {
  if (split.wait == Wait::kNone) return "running";
  std::string what = describe_barrier(warp, split);
  if (what.empty()) what = describe_cluster_barrier(warp, split);
  if (what.empty()) what = split.waits_for ? split.waits_for : "something";
  if (split.wait == Wait::kConverge) {
    what += " (lanes " + describe_lanes(warp.alive() & ~split.mask) + " are elsewhere)";
  }
  return "waits for " + what;
}

std::string describe_numbers(const std::vector<uint32_t>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (!text.empty()) text += ',';
    text += std::to_string(numbers[i]);
    if (end - i > 1) text += '-' + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

// The CTA's lanes by where they are and why: several warps at one place are one line.
void add_lines(const Cta& cta, std::vector<std::string>* lines) {
  std::map<std::string, std::vector<uint32_t>> warps_at;
  std::vector<std::string> order;
  const auto add = [&](const Warp& warp, const Split& split) {
    if (split.mask == 0) return;
    const Instr& instr = warp.program->code[split.pc];
    std::string place = describe_lanes(split.mask) + ": " +
                        describe_instruction(*warp.program, instr) + ": " + reason_of(warp, split);
    std::vector<uint32_t>& warps = warps_at[place];
    if (warps.empty()) order.push_back(place);
    warps.push_back(warp.index);
  };
  for (const Warp& warp : cta.warps) {
    if (warp.done()) continue;
    add(warp, warp.current);
    for (const Split& split : warp.others) add(warp, split);
  }
  for (const std::string& place : order) {
    lines->push_back("  block (" + std::to_string(cta.index.x) + ", " +
                     std::to_string(cta.index.y) + ", " + std::to_string(cta.index.z) + "), warp " +
                     describe_numbers(warps_at[place]) + ", lanes " + place);
  }
}

}  // namespace

std::string describe_waiting(const std::vector<std::unique_ptr<ClusterSlot>>& running) {
  std::vector<std::string> lines;
  for (const auto& cluster : running) {
    for (const Cta* cta : cluster->cluster.ctas) add_lines(*cta, &lines);
  }
  std::string text;
  for (size_t i = 0; i < lines.size() && i < kMaxLines; ++i) text += lines[i] + "\n";
  if (lines.size() > kMaxLines)
    text += "  and " + std::to_string(lines.size() - kMaxLines) + " more\n";
  if (!text.empty()) text.pop_back();
  return text;
}

}  // namespace fused_peft::sim
