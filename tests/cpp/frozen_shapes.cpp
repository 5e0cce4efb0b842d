// RMS norm, gated SiLU and cross-entropy without torch, built with AddressSanitizer and UBSan:
// every instruction set that this processor has, odd shapes, every dtype, buffers that end where
// the data ends. Values are compared with plain double loops; the sharp comparison of errors is in
// tests/test_frozen_layer_ops.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/frozen_layers.h"
#include "matrix.h"

using namespace fused_peft;

namespace {

int failures = 0;
const ParallelFor kParallel{run_threads, 3};

void expect(const char* what, const Matrix& m, cpu::Isa isa) {
  const double limit = m.dtype == DType::kFloat32    ? 1e-5
                       : m.dtype == DType::kBFloat16 ? 4e-3
                                                     : 5e-4;
  if (m.error() <= limit) return;
  std::printf("%s: %s %ld x %ld dtype=%d: error %g\n", cpu::isa_name(isa), what,
              static_cast<long>(m.rows), static_cast<long>(m.cols), static_cast<int>(m.dtype),
              m.error());
  ++failures;
}

double& value(Matrix& m, int64_t i, int64_t j) {
  return m.values[static_cast<size_t>(i * m.cols + j)];
}

void norm(int64_t m, int64_t h, DType dtype, cpu::Isa isa, std::mt19937& generator) {
  Matrix x(m, h, dtype), weight(1, h, dtype), y(m, h, dtype), dy(m, h, dtype), dx(m, h, dtype);
  for (Matrix* t : {&x, &weight, &dy}) t->fill(generator);
  std::vector<double> rstd(static_cast<size_t>(m));
  RmsNorm a;
  a.m = m, a.h = h, a.x = x.view(), a.weight = weight.view(), a.eps = 1e-3;
  a.y = y.data(), a.rstd = rstd.data(), a.dy = dy.view(), a.dx = dx.data();
  if (cpu::rms_norm_forward(a, isa, kParallel) != Status::kOk) ++failures;
  if (cpu::rms_norm_backward(a, isa, kParallel) != Status::kOk) ++failures;
  for (int64_t i = 0; i < m; ++i) {
    double squares = 0, product = 0;
    for (int64_t j = 0; j < h; ++j) {
      squares += x.at(i, j) * x.at(i, j);
      product += dy.at(i, j) * weight.at(0, j) * x.at(i, j);
    }
    const double r = 1.0 / std::sqrt(squares / static_cast<double>(h) + a.eps);
    for (int64_t j = 0; j < h; ++j) {
      value(y, i, j) = x.at(i, j) * r * weight.at(0, j);
      value(dx, i, j) = r * (dy.at(i, j) * weight.at(0, j) -
                             x.at(i, j) * r * r * product / static_cast<double>(h));
    }
  }
  expect("rms_norm", y, isa);
  if (h > 8) expect("rms_norm dx", dx, isa);  // in a short row its terms cancel
}

void gated(int64_t n, DType dtype, cpu::Isa isa, std::mt19937& generator) {
  Matrix gate(1, n, dtype), up(1, n, dtype), y(1, n, dtype), dy(1, n, dtype), dgate(1, n, dtype);
  Matrix dup(1, n, dtype);
  for (Matrix* t : {&gate, &up, &dy}) t->fill(generator);
  SwiGlu a;
  a.n = n, a.dtype = dtype, a.gate = gate.data(), a.up = up.data(), a.y = y.data();
  a.dy = dy.data(), a.dgate = dgate.data(), a.dup = dup.data();
  if (cpu::swiglu_forward(a, isa, kParallel) != Status::kOk) ++failures;
  if (cpu::swiglu_backward(a, isa, kParallel) != Status::kOk) ++failures;
  for (int64_t j = 0; j < n; ++j) {
    const double g = gate.at(0, j), s = 1.0 / (1.0 + std::exp(-g));
    value(y, 0, j) = g * s * up.at(0, j);
    value(dgate, 0, j) = dy.at(0, j) * up.at(0, j) * s * (1.0 + g * (1.0 - s));
    value(dup, 0, j) = dy.at(0, j) * g * s;
  }
  expect("swiglu", y, isa);
  expect("swiglu dgate", dgate, isa);
  expect("swiglu dup", dup, isa);
}

void loss(int64_t m, int64_t v, DType dtype, cpu::Isa isa, std::mt19937& generator) {
  Matrix logits(m, v, dtype), dlogits(m, v, dtype), losses(1, m, DType::kFloat32);
  logits.fill(generator);
  std::vector<int64_t> labels;
  std::vector<float> dloss(static_cast<size_t>(m), 0.5F);
  std::vector<double> lse(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) labels.push_back(i % 3 == 1 ? -100 : (7 * i) % v);
  CrossEntropy a;
  a.m = m, a.v = v, a.logits = logits.view(), a.labels = labels.data();
  a.loss = static_cast<float*>(losses.data()), a.lse = lse.data();
  a.dloss = dloss.data(), a.dlogits = dlogits.data();
  if (cpu::cross_entropy_forward(a, isa, kParallel) != Status::kOk) ++failures;
  if (cpu::cross_entropy_backward(a, isa, kParallel) != Status::kOk) ++failures;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t label = labels[static_cast<size_t>(i)];
    if (label < 0) continue;
    const double own = logits.at(i, label);  // taken off first: one column alone loses exactly 0
    double sum = 0;
    for (int64_t j = 0; j < v; ++j) sum += std::exp(logits.at(i, j) - own);
    value(losses, 0, i) = std::log(sum);
    for (int64_t j = 0; j < v; ++j)
      value(dlogits, i, j) =
          0.5 * (std::exp(logits.at(i, j) - own) / sum - (j == label ? 1.0 : 0.0));
  }
  expect("cross_entropy", losses, isa);
  expect("cross_entropy dlogits", dlogits, isa);
}

}  // namespace

int main() {
  constexpr int64_t kShapes[][2] = {{0, 5}, {1, 1}, {3, 7}, {5, 16}, {4, 33}, {70, 576}, {2, 4100}};
  std::mt19937 generator(0);
  int runs = 0;
  for (int i = 0; i < cpu::kNumIsa; ++i) {
    const auto isa = static_cast<cpu::Isa>(i);
    if (!cpu::isa_available(isa)) continue;
    for (const auto& s : kShapes)
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        norm(s[0], s[1], dtype, isa, generator);
        gated(s[0] * s[1], dtype, isa, generator);
        loss(s[0], s[1], dtype, isa, generator);
        runs += 3;
      }
  }
  std::printf("frozen_shapes: %d problems, %d failures\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
