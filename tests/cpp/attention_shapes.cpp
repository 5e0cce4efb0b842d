// Prefix attention without torch, built with AddressSanitizer and UBSan: every instruction set that
// this processor has, odd shapes, every dtype, buffers that end where the data ends. Values are
// compared with plain double loops; the sharp comparison of errors is in
// tests/test_attention_ops.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/prefix_attention.h"
#include "matrix.h"

using namespace fused_peft;

namespace {

struct Case {
  int64_t batch, q_heads, kv_heads, queries, keys, head_dim, prefix;
  bool causal, shared;
  int64_t window;
  bool lengths, mask;
};

// [B, heads, length, D] as a matrix of rows.
struct Heads : Matrix {
  int64_t heads, length;
  Heads(int64_t batch, int64_t heads_, int64_t length_, int64_t d, DType dtype_)
      : Matrix(batch * heads_ * length_, d, dtype_), heads(heads_), length(length_) {}
  int64_t row(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * length + i; }
  HeadsView view() { return {data(), heads * length * cols, length * cols, cols}; }
  HeadsOut out() { return {data(), heads * length * cols, length * cols, cols}; }
  void add(int64_t r, int64_t d, double value) {
    values[static_cast<size_t>(r * cols + d)] += value;
  }
};

int failures = 0;

void expect(const char* what, const Matrix& m, const Case& c, cpu::Isa isa) {
  const double limit = m.dtype == DType::kFloat32    ? 2e-5
                       : m.dtype == DType::kBFloat16 ? 1e-2
                                                     : 1e-3;
  const double error = m.error();
  if (error <= limit) return;
  std::printf("%s: %s B=%ld Hq=%ld Hkv=%ld S=%ld T=%ld D=%ld P=%ld dtype=%d: error %g\n",
              cpu::isa_name(isa), what, static_cast<long>(c.batch), static_cast<long>(c.q_heads),
              static_cast<long>(c.kv_heads), static_cast<long>(c.queries),
              static_cast<long>(c.keys), static_cast<long>(c.head_dim), static_cast<long>(c.prefix),
              static_cast<int>(m.dtype), error);
  ++failures;
}

void run(const Case& c, DType dtype, double dropout_p, cpu::Isa isa, std::mt19937& generator) {
  const int64_t d = c.head_dim, prefix_batch = c.shared ? 1 : c.batch;
  Heads q(c.batch, c.q_heads, c.queries, d, dtype), k(c.batch, c.kv_heads, c.keys, d, dtype);
  Heads v(c.batch, c.kv_heads, c.keys, d, dtype), pk(prefix_batch, c.kv_heads, c.prefix, d, dtype);
  Heads pv(prefix_batch, c.kv_heads, c.prefix, d, dtype),
      out(c.batch, c.q_heads, c.queries, d, dtype);
  Heads dout(c.batch, c.q_heads, c.queries, d, dtype), dq(c.batch, c.q_heads, c.queries, d, dtype);
  Heads dk(c.batch, c.kv_heads, c.keys, d, dtype), dv(c.batch, c.kv_heads, c.keys, d, dtype);
  Heads dpk(prefix_batch, c.kv_heads, c.prefix, d, dtype);
  Heads dpv(prefix_batch, c.kv_heads, c.prefix, d, dtype);
  std::vector<double> lse(static_cast<size_t>(c.batch * c.q_heads * c.queries));
  for (Matrix* m :
       {static_cast<Matrix*>(&q), static_cast<Matrix*>(&k), static_cast<Matrix*>(&v),
        static_cast<Matrix*>(&pk), static_cast<Matrix*>(&pv), static_cast<Matrix*>(&dout)})
    m->fill(generator);
  std::vector<int64_t> lengths;
  std::vector<uint8_t> mask;
  for (int64_t b = 0; b < c.batch; ++b) {
    lengths.push_back(std::max<int64_t>(0, c.keys - 3 * b - 1));
    for (int64_t t = 0; t < c.keys; ++t) mask.push_back((t + b) % 5 != 0);
  }
  PrefixAttentionForward forward;
  PrefixAttentionParams& p = forward.problem;
  p.batch = c.batch, p.q_heads = c.q_heads, p.kv_heads = c.kv_heads;
  p.queries = c.queries, p.keys = c.keys, p.prefix = c.prefix, p.head_dim = d, p.dtype = dtype;
  p.q = q.view(), p.k = k.view(), p.v = v.view(), p.prefix_k = pk.view(), p.prefix_v = pv.view();
  if (c.shared) p.prefix_k.batch_stride = p.prefix_v.batch_stride = 0;
  p.shared_prefix = c.shared;
  p.causal = c.causal, p.window = c.window;
  if (c.lengths) p.key_lengths = lengths.data();
  if (c.mask) p.key_mask = mask.data(), p.key_mask_stride = c.keys;
  p.scale = 0.3;
  p.dropout_p = dropout_p;
  p.seed = 1234567890123456789ULL;
  forward.out = out.out();
  forward.lse = lse.data();
  const ParallelFor parallel{run_threads, 3};
  if (cpu::prefix_attention_forward(forward, isa, parallel) != Status::kOk) ++failures;
  PrefixAttentionBackward backward;
  backward.problem = p;
  backward.dout = dout.view(), backward.out = out.view(), backward.lse = forward.lse;
  backward.dq = dq.out(), backward.dk = dk.out(), backward.dv = dv.out();
  backward.dprefix_k = dpk.out(), backward.dprefix_v = dpv.out();
  if (cpu::prefix_attention_backward(backward, isa, parallel) != Status::kOk) ++failures;
  if (dropout_p > 0) return;  // values under dropout are compared in Python, with its own Philox
  const int64_t group = c.q_heads / c.kv_heads, all = c.prefix + c.keys;
  std::vector<double> weight(static_cast<size_t>(all)), dweight(static_cast<size_t>(all));
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.q_heads; ++h)
      for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t kv = h / group, row = q.row(b, h, i), position = c.keys - c.queries + i;
        const auto key = [&](int64_t j, Heads& prefix, Heads& sequence) {
          Heads& m = j < c.prefix ? prefix : sequence;
          const int64_t pb = c.shared ? 0 : b;
          return std::pair<Heads&, int64_t>(
              m, j < c.prefix ? m.row(pb, kv, j) : m.row(b, kv, j - c.prefix));
        };
        const auto dot = [&](Heads& a, int64_t a_row, Heads& prefix, Heads& sequence, int64_t j) {
          const auto [m, r] = key(j, prefix, sequence);
          double sum = 0;
          for (int64_t x = 0; x < d; ++x) sum += a.at(a_row, x) * m.at(r, x);
          return sum;
        };
        double largest = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < all; ++j) {
          const int64_t t = j - c.prefix;
          const bool seen = t < 0 || ((!c.causal || t <= position) &&
                                      (!c.lengths || t < lengths[static_cast<size_t>(b)]) &&
                                      (!c.mask || mask[static_cast<size_t>(b * c.keys + t)]) &&
                                      (c.window == 0 || std::abs(position - t) < c.window));
          double& w = weight[static_cast<size_t>(j)];
          w = seen ? p.scale * dot(q, row, pk, k, j) : -INFINITY;
          largest = std::max(largest, w);
        }
        for (double& w : weight) sum += w = w == -INFINITY ? 0.0 : std::exp(w - largest);
        for (int64_t j = 0; j < all; ++j) {
          weight[static_cast<size_t>(j)] /= sum > 0 ? sum : 1.0;
          dweight[static_cast<size_t>(j)] = dot(dout, row, pv, v, j);
          delta += weight[static_cast<size_t>(j)] * dweight[static_cast<size_t>(j)];
        }
        for (int64_t j = 0; j < all; ++j) {
          const double w = weight[static_cast<size_t>(j)];
          const double ds = p.scale * w * (dweight[static_cast<size_t>(j)] - delta);
          const auto [km, kr] = key(j, pk, k);
          const auto [vm, vr] = key(j, pv, v);
          Heads& dkm = j < c.prefix ? dpk : dk;
          Heads& dvm = j < c.prefix ? dpv : dv;
          for (int64_t x = 0; x < d; ++x) {
            out.add(row, x, w * vm.at(vr, x));
            dq.add(row, x, ds * km.at(kr, x));
            dkm.add(kr, x, ds * q.at(row, x));
            dvm.add(vr, x, w * dout.at(row, x));
          }
        }
      }
  expect("out", out, c, isa);
  expect("dq", dq, c, isa);
  expect("dk", dk, c, isa);
  expect("dv", dv, c, isa);
  expect("dprefix_k", dpk, c, isa);
  expect("dprefix_v", dpv, c, isa);
}

}  // namespace

int main() {
  // B, Hq, Hkv, S, T, D, P, causal, shared prefix, window, key_lengths, key_mask
  const Case cases[] = {
      {2, 1, 1, 2, 3, 8, 2, true, true, 0, false, false},
      {2, 3, 1, 1, 40, 64, 5, true, true, 0, true, false},
      {2, 6, 2, 17, 19, 40, 7, true, false, 0, false, true},
      {1, 4, 4, 65, 70, 32, 0, false, true, 0, false, true},
      {2, 4, 1, 40, 41, 96, 33, true, true, 9, true, true},
      {1, 2, 2, 133, 133, 80, 130, true, true, 0, false, false},
      {3, 2, 1, 7, 11, 136, 3, false, false, 4, true, false},
      {1, 3, 3, 30, 600, 16, 64, true, true, 0, false, false},
      {0, 2, 1, 4, 4, 16, 3, true, true, 0, false, false},
      {2, 2, 1, 0, 4, 16, 3, false, false, 0, false, false},
  };
  std::mt19937 generator(0);
  int runs = 0;
  for (int i = 0; i < cpu::kNumIsa; ++i) {
    const auto isa = static_cast<cpu::Isa>(i);
    if (!cpu::isa_available(isa)) continue;
    for (const Case& c : cases)
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
        for (const double p : {0.0, 0.25}) {
          run(c, dtype, p, isa, generator);
          ++runs;
        }
  }
  std::printf("attention_shapes: %d problems, %d failures\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
