// The CPU kernels without torch, built with AddressSanitizer and UBSan: every instruction set that
// this processor has, odd shapes, every dtype, buffers that end where the data ends. Values are
// compared with a plain double loop; the sharp comparison of errors is in tests/test_lora_ops.py.
#include <cstdint>
#include <cstdio>
#include <random>

#include "kernels/lora_linear.h"
#include "matrix.h"

using namespace fused_peft;

namespace {

struct Case {
  int64_t m, n, k, r;
  DType dtype, adapter;
};

// out(i, j) = sum over l of a(i, l) b(l, j), with transposes as index swaps by the callers.
template <class A, class B>
void product(Matrix& out, int64_t inner, double scale, A a, B b, bool add = false) {
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.cols; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < inner; ++l) sum += a(i, l) * b(l, j);
      double& to = out.values[static_cast<size_t>(i * out.cols + j)];
      to = (add ? to : 0.0) + scale * sum;
    }
}

int failures = 0;

void expect(const char* what, const Matrix& m, const Case& c, cpu::Isa isa, float p) {
  const double limit = m.dtype == DType::kFloat32    ? 2e-5
                       : m.dtype == DType::kBFloat16 ? 4e-3
                                                     : 5e-4;
  const double half_tail = c.dtype == DType::kBFloat16 && m.dtype == DType::kFloat32 ? 4e-3 : 0.0;
  const double error = m.error();
  if (error <= limit + (p > 0 ? half_tail : 0.0)) return;
  std::printf("%s: %s M=%ld N=%ld K=%ld R=%ld dtype=%d/%d p=%g: error %g\n", cpu::isa_name(isa),
              what, static_cast<long>(c.m), static_cast<long>(c.n), static_cast<long>(c.k),
              static_cast<long>(c.r), static_cast<int>(c.dtype), static_cast<int>(c.adapter),
              static_cast<double>(p), error);
  ++failures;
}

void run(const Case& c, cpu::Isa isa, float dropout_p, std::mt19937& generator) {
  Matrix x(c.m, c.k, c.dtype), w(c.n, c.k, c.dtype), a(c.r, c.k, c.adapter), b(c.n, c.r, c.adapter);
  Matrix bias(1, c.n, c.dtype), y(c.m, c.n, c.dtype), s(c.m, c.r, DType::kFloat32);
  Matrix dy(c.m, c.n, c.dtype), dx(c.m, c.k, c.dtype), da(c.r, c.k, c.adapter);
  Matrix db(c.n, c.r, c.adapter), dbias(1, c.n, c.dtype), ds(c.m, c.r, DType::kFloat32);
  for (Matrix* m : {&x, &w, &a, &b, &bias, &dy}) m->fill(generator);
  LoraLinearForward forward;
  LoraLinearParams& p = forward.problem;
  p.m = c.m, p.n = c.n, p.k = c.k, p.r = c.r;
  p.x = x.view(), p.weight = w.view(), p.lora_a = a.view(), p.lora_b = b.view();
  p.bias = bias.view();
  p.scaling = 0.5;
  p.dropout_p = dropout_p;
  p.seed = 1234567890123456789ULL;
  forward.s = static_cast<float*>(s.data());
  forward.y = y.data();
  forward.y_row_stride = c.n;
  const ParallelFor parallel{run_threads, 3};
  if (cpu::lora_linear_forward(forward, isa, parallel) != Status::kOk) ++failures;
  LoraLinearBackward backward;
  backward.problem = p;
  backward.dy = dy.view();
  backward.s = forward.s;
  backward.dx = dx.data(), backward.dlora_a = da.data(), backward.dlora_b = db.data();
  backward.dbias = dbias.data();
  if (cpu::lora_linear_backward(backward, isa, parallel) != Status::kOk) ++failures;
  if (dropout_p > 0) return;  // values under dropout are compared in Python, with its own Philox
  product(
      s, c.k, 0.5, [&](auto i, auto l) { return x.at(i, l); },
      [&](auto l, auto j) { return a.at(j, l); });
  product(
      y, c.k, 1.0, [&](auto i, auto l) { return x.at(i, l); },
      [&](auto l, auto j) { return w.at(j, l); });
  product(
      y, c.r, 1.0, [&](auto i, auto l) { return s.at(i, l); },
      [&](auto l, auto j) { return b.at(j, l); }, true);
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) y.values[static_cast<size_t>(i * c.n + j)] += bias.at(0, j);
  product(
      ds, c.n, 0.5, [&](auto i, auto l) { return dy.at(i, l); },
      [&](auto l, auto j) { return b.at(l, j); });
  product(
      dx, c.n, 1.0, [&](auto i, auto l) { return dy.at(i, l); },
      [&](auto l, auto j) { return w.at(l, j); });
  product(
      dx, c.r, 1.0, [&](auto i, auto l) { return ds.at(i, l); },
      [&](auto l, auto j) { return a.at(l, j); }, true);
  product(
      da, c.m, 1.0, [&](auto i, auto l) { return ds.at(l, i); },
      [&](auto l, auto j) { return x.at(l, j); });
  product(
      db, c.m, 1.0, [&](auto i, auto l) { return dy.at(l, i); },
      [&](auto l, auto j) { return s.at(l, j); });
  product(
      dbias, c.m, 1.0, [](auto, auto) { return 1.0; }, [&](auto l, auto j) { return dy.at(l, j); });
  expect("s", s, c, isa, dropout_p);
  expect("y", y, c, isa, dropout_p);
  expect("dx", dx, c, isa, dropout_p);
  expect("dlora_a", da, c, isa, dropout_p);
  expect("dlora_b", db, c, isa, dropout_p);
  expect("dbias", dbias, c, isa, dropout_p);
}

// The update on a base that is given, in both passes.
void run_update(const Case& c, cpu::Isa isa, float dropout_p, std::mt19937& generator) {
  Matrix x(c.m, c.k, c.dtype), a(c.r, c.k, c.adapter), b(c.n, c.r, c.adapter);
  Matrix base(c.m, c.n, c.dtype), y(c.m, c.n, c.dtype), s(c.m, c.r, DType::kFloat32);
  Matrix dy(c.m, c.n, c.dtype), dx(c.m, c.k, c.dtype), ds(c.m, c.r, DType::kFloat32);
  for (Matrix* m : {&x, &a, &b, &base, &dy}) m->fill(generator);
  LoraLinearForward forward;
  LoraLinearParams& p = forward.problem;
  p.m = c.m, p.n = c.n, p.k = c.k, p.r = c.r;
  p.x = x.view(), p.lora_a = a.view(), p.lora_b = b.view();
  p.scaling = 0.5;
  p.dropout_p = dropout_p;
  p.seed = 1234567890123456789ULL;
  forward.base = base.view();
  forward.s = static_cast<float*>(s.data());
  forward.y = y.data();
  forward.y_row_stride = c.n;
  const ParallelFor parallel{run_threads, 3};
  if (cpu::lora_linear_forward(forward, isa, parallel) != Status::kOk) ++failures;
  LoraLinearBackward backward;
  backward.problem = p;
  backward.dy = dy.view();
  backward.s = forward.s;
  backward.dx = dx.data();
  if (cpu::lora_linear_backward(backward, isa, parallel) != Status::kOk) ++failures;
  if (dropout_p > 0) return;
  product(
      s, c.k, 0.5, [&](auto i, auto l) { return x.at(i, l); },
      [&](auto l, auto j) { return a.at(j, l); });
  y.values = base.values;
  product(
      y, c.r, 1.0, [&](auto i, auto l) { return s.at(i, l); },
      [&](auto l, auto j) { return b.at(j, l); }, true);
  product(
      ds, c.n, 0.5, [&](auto i, auto l) { return dy.at(i, l); },
      [&](auto l, auto j) { return b.at(l, j); });
  product(
      dx, c.r, 1.0, [&](auto i, auto l) { return ds.at(i, l); },
      [&](auto l, auto j) { return a.at(l, j); });
  expect("y on a base", y, c, isa, dropout_p);
  expect("dx of the update", dx, c, isa, dropout_p);
}

}  // namespace

int main() {
  constexpr int64_t kShapes[][4] = {
      {0, 3, 5, 2},     {1, 1, 1, 1},      {1, 17, 33, 3},   {2, 48, 64, 16},  {7, 13, 129, 5},
      {16, 100, 31, 8}, {17, 49, 97, 12},  {25, 96, 48, 64}, {64, 47, 50, 33}, {100, 65, 130, 7},
      {531, 50, 37, 9}, {33, 20, 2100, 4}, {40, 24, 24, 256}};
  std::mt19937 generator(0);
  int runs = 0;
  for (int i = 0; i < cpu::kNumIsa; ++i) {
    const auto isa = static_cast<cpu::Isa>(i);
    if (!cpu::isa_available(isa)) continue;
    for (const auto& s : kShapes)
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
        for (const DType adapter : {dtype, DType::kFloat32})
          for (const float p : {0.0F, 0.25F}) {
            const Case problem{s[0], s[1], s[2], s[3], dtype, adapter};
            run(problem, isa, p, generator);
            run_update(problem, isa, p, generator);
            runs += 2;
          }
  }
  std::printf("lora_shapes: %d problems, %d failures\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
