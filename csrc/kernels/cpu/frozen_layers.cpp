// Drivers of the layers between the adapted ones: rows, or ranges of elements, over threads.
#include "kernels/frozen_layers.h"

#include <algorithm>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/isa.h"

namespace fused_peft::cpu {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kLeastElements = 1 << 14;

// Runs fn(begin, end) over [0, count) in pieces that are multiples of step.
template <class Fn>
Status over(int64_t count, int64_t elements_of_one, int64_t step, const ParallelFor& parallel,
            const Fn& fn) {
  if (count <= 0) return Status::kOk;
  const int64_t most = std::max<int64_t>(1, count * elements_of_one / kLeastElements);
  const int64_t parts = std::min<int64_t>(parallel.num_threads, most);
  const int64_t size = round_up(ceil_div(count, parts), step);
  const auto task = [&](int64_t i, char*) { fn(i * size, std::min(count, (i + 1) * size)); };
  return for_each_task(1, parallel, ceil_div(count, size), task) ? Status::kOk
                                                                 : Status::kOutOfMemory;
}

bool covered(const RmsNorm& a, Isa isa) {
  return isa_available(isa) && a.h >= 1 && a.x.col_stride == 1 && a.weight.col_stride == 1;
}

bool covered(const CrossEntropy& a, Isa isa) {
  return isa_available(isa) && a.v >= 1 && a.logits.col_stride == 1;
}

constexpr int64_t kRangeStep = 64;

}  // namespace

Status rms_norm_forward(const RmsNorm& a, Isa isa, const ParallelFor& parallel) {
  if (!covered(a, isa)) return Status::kUnsupported;
  const KernelTable& table = kernel_table(isa);
  return over(a.m, a.h, 1, parallel, [&](int64_t m0, int64_t m1) { table.rms_norm(a, m0, m1); });
}

Status rms_norm_backward(const RmsNorm& a, Isa isa, const ParallelFor& parallel) {
  if (!covered(a, isa) || a.dy.col_stride != 1) return Status::kUnsupported;
  const KernelTable& table = kernel_table(isa);
  return over(a.m, a.h, 1, parallel,
              [&](int64_t m0, int64_t m1) { table.rms_norm_backward(a, m0, m1); });
}

Status swiglu_forward(const SwiGlu& a, Isa isa, const ParallelFor& parallel) {
  if (!isa_available(isa)) return Status::kUnsupported;
  const KernelTable& table = kernel_table(isa);
  return over(a.n, 1, kRangeStep, parallel,
              [&](int64_t i0, int64_t i1) { table.swiglu(a, i0, i1); });
}

Status swiglu_backward(const SwiGlu& a, Isa isa, const ParallelFor& parallel) {
  if (!isa_available(isa)) return Status::kUnsupported;
  const KernelTable& table = kernel_table(isa);
  return over(a.n, 1, kRangeStep, parallel,
              [&](int64_t i0, int64_t i1) { table.swiglu_backward(a, i0, i1); });
}

Status cross_entropy_forward(const CrossEntropy& a, Isa isa, const ParallelFor& parallel) {
  if (!covered(a, isa)) return Status::kUnsupported;
  const KernelTable& table = kernel_table(isa);
  return over(a.m, a.v, 1, parallel,
              [&](int64_t m0, int64_t m1) { table.cross_entropy(a, m0, m1); });
}

Status cross_entropy_backward(const CrossEntropy& a, Isa isa, const ParallelFor& parallel) {
  if (!covered(a, isa)) return Status::kUnsupported;
  const KernelTable& table = kernel_table(isa);
  return over(a.m, a.v, 1, parallel,
              [&](int64_t m0, int64_t m1) { table.cross_entropy_backward(a, m0, m1); });
}

}  // namespace fused_peft::cpu
