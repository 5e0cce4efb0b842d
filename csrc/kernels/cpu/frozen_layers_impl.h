// Rows and ranges of the layers that stand between the adapted ones. Everything is computed in
// float and rounded once.
#include "kernels/cpu/attention_backward_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

// e^x for x <= 88: n = round(x / log 2) and the rest exactly, as x less n times log 2 in two parts,
// then a minimax polynomial (3e-9). Rounding x / log 2 instead, as the attention does with scores
// it must scale anyway, would cost a digit at x = 16. 0 below -87, NaN for NaN.
inline Vec exp_vec(Vec x) {
  const Vec magic = broadcast(12582912.0F);  // 1.5 * 2^23: n lands in the low bits
  const Vec shifted = x * static_cast<float>(1.0 / kLog2) + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693115234375F) - n * 3.194618494528623e-05F;
  Vec p = r * 0.001381461275741458F + 0.008368710055947304F;
  p = p * r + 0.04166838899254799F;
  p = p * r + 0.1666652113199234F;
  p = p * r + 0.4999999403953552F;
  p = r * r * p + r + 1.0F;
  const VecU bits = reinterpret_cast<VecU>(p) + (reinterpret_cast<VecU>(shifted) << 23);
  const VecI underflow = x < -87.0F;
  return reinterpret_cast<Vec>(reinterpret_cast<VecI>(bits) & ~underflow);
}

// Sum of term(j) over the vectors of a row: short sums in float (kChunkSteps says why), added up in
// double, since the error of a row's sum is one of all its elements.
template <class Term>
inline double sum_of_row(int64_t size, const Term& term) {
  double sum = 0.0;
  for (int64_t j0 = 0; j0 < size; j0 += kChunkSteps * kLanes) {
    const int64_t end = smaller(size, j0 + kChunkSteps * kLanes);
    Vec part = {};
    for (int64_t j = j0; j < end; j += kLanes) part += term(j);
    sum += double{fold_lanes(part, [](Vec a, Vec b) { return a + b; })};
  }
  return sum;
}

// A double as the float nearest to it and what that leaves over.
struct SplitDouble {
  float high, low;
};

inline SplitDouble split(double value) {
  const auto high = static_cast<float>(value);
  return {high, static_cast<float>(value - double{high})};
}

template <class Fn>
inline void with_output(void* data, DType dtype, const Fn& fn) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    fn(static_cast<T*>(data));
  });
}

// Calls fn(x, weight) with typed pointers.
template <class Fn>
inline void with_norm_operands(const RmsNorm& a, const Fn& fn) {
  with_dtype(a.x.dtype, [&](auto* x) {
    with_dtype(a.weight.dtype, [&](auto* w) {
      fn(static_cast<decltype(x)>(a.x.data), static_cast<decltype(w)>(a.weight.data));
    });
  });
}

inline void rms_norm_rows(const RmsNorm& a, int64_t m0, int64_t m1) {
  with_norm_operands(a, [&](auto* all, auto* weight) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(all)>>;
    for (int64_t i = m0; i < m1; ++i) {
      const T* x = all + i * a.x.row_stride;
      T* y = static_cast<T*>(a.y) + i * a.h;
      const double squares = sum_of_row(a.h, [&](int64_t j) {
        const Vec v = load_partial(x + j, a.h - j);
        return v * v;
      });
      const double mean = squares / static_cast<double>(a.h) + a.eps;
      a.rstd[i] = 1.0 / __builtin_sqrt(mean);
      const auto [high, low] = split(a.rstd[i]);
      for (int64_t j = 0; j < a.h; j += kLanes) {
        const Vec v = load_partial(x + j, a.h - j);
        store_partial(y + j, (v * high + v * low) * load_partial(weight + j, a.h - j), a.h - j);
      }
    }
  });
}

inline void rms_norm_backward_rows(const RmsNorm& a, int64_t m0, int64_t m1) {
  with_norm_operands(a, [&](auto* all, auto* weight) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(all)>>;
    for (int64_t i = m0; i < m1; ++i) {
      const T* x = all + i * a.x.row_stride;
      const T* dy = static_cast<const T*>(a.dy.data) + i * a.dy.row_stride;
      T* dx = static_cast<T*>(a.dx) + i * a.h;
      const auto scaled = [&](int64_t j) {
        return load_partial(dy + j, a.h - j) * load_partial(weight + j, a.h - j);
      };
      const double product =
          sum_of_row(a.h, [&](int64_t j) { return scaled(j) * load_partial(x + j, a.h - j); });
      const auto [high, low] = split(a.rstd[i]);
      const auto factor =
          static_cast<float>(product / static_cast<double>(a.h) * a.rstd[i] * a.rstd[i]);
      for (int64_t j = 0; j < a.h; j += kLanes) {
        const Vec v = scaled(j) - load_partial(x + j, a.h - j) * factor;
        store_partial(dx + j, v * high + v * low, a.h - j);
      }
    }
  });
}

// 1 + exp(-x).
inline Vec one_plus_exp(Vec x) {
  const Vec limit = broadcast(87.0F);  // beyond it x / (1 + exp(-x)) is 0 to float's precision
  return 1.0F + exp_vec(select(-x > limit, limit, -x));
}

inline void swiglu_range(const SwiGlu& a, int64_t i0, int64_t i1) {
  with_output(a.y, a.dtype, [&](auto* y) {
    using T = std::remove_pointer_t<decltype(y)>;
    const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
    for (int64_t i = i0; i < i1; i += kLanes) {
      const Vec g = load_partial(gate + i, i1 - i);
      store_partial(y + i, g / one_plus_exp(g) * load_partial(up + i, i1 - i), i1 - i);
    }
  });
}

inline void swiglu_backward_range(const SwiGlu& a, int64_t i0, int64_t i1) {
  with_output(a.dgate, a.dtype, [&](auto* dgate) {
    using T = std::remove_pointer_t<decltype(dgate)>;
    const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
    const T* dy = static_cast<const T*>(a.dy);
    T* dup = static_cast<T*>(a.dup);
    for (int64_t i = i0; i < i1; i += kLanes) {
      const Vec g = load_partial(gate + i, i1 - i), d = load_partial(dy + i, i1 - i);
      const Vec e = one_plus_exp(g);
      const Vec s = 1.0F / e;
      // silu'(g) = s (1 + g (1 - s))
      store_partial(dgate + i, d * load_partial(up + i, i1 - i) * s * (1.0F + g * (1.0F - s)),
                    i1 - i);
      store_partial(dup + i, d * (g / e), i1 - i);
    }
  });
}

inline void cross_entropy_rows(const CrossEntropy& a, int64_t m0, int64_t m1) {
  with_dtype(a.logits.dtype, [&](auto* type) {
    for (int64_t i = m0; i < m1; ++i) {
      a.loss[i] = 0.0F;
      a.lse[i] = 0.0;
      if (a.labels[i] == a.ignore_index) continue;
      const auto* x = static_cast<decltype(type)>(a.logits.data) + i * a.logits.row_stride;
      const int64_t whole = a.v / kLanes * kLanes;
      Vec largest = broadcast(kMinusInfinity);
      for (int64_t j = 0; j < whole; j += kLanes) largest = vec_max(largest, load(x + j));
      float m = fold_lanes(largest, vec_max);
      for (int64_t j = whole; j < a.v; ++j) {
        const float v = load_partial(x + j, 1)[0];
        m = v > m ? v : m;
      }
      const Vec offset = broadcast(m == kMinusInfinity ? 0.0F : m);
      double sum = sum_of_row(whole, [&](int64_t j) { return exp_vec(load(x + j) - offset); });
      for (int64_t j = whole; j < a.v; ++j)
        sum += double{exp_vec(load_partial(x + j, 1) - offset)[0]};
      const double lse = double{offset[0]} + __builtin_log(sum);
      a.lse[i] = lse;
      a.loss[i] = static_cast<float>(lse - double{load_partial(x + a.labels[i], 1)[0]});
    }
  });
}

inline void cross_entropy_backward_rows(const CrossEntropy& a, int64_t m0, int64_t m1) {
  with_output(a.dlogits, a.logits.dtype, [&](auto* all) {
    using T = std::remove_pointer_t<decltype(all)>;
    for (int64_t i = m0; i < m1; ++i) {
      T* dx = all + i * a.v;
      const float dloss = a.dloss[i * a.dloss_stride];
      const int64_t label = a.labels[i];
      if (label == a.ignore_index) {
        std::memset(dx, 0, static_cast<size_t>(a.v) * sizeof(T));
        continue;
      }
      const T* x = static_cast<const T*>(a.logits.data) + i * a.logits.row_stride;
      const auto [high, low] = split(a.lse[i]);
      const Vec whole = broadcast(high), rest = broadcast(low);
      const auto probability = [&](Vec v) { return exp_vec((v - whole) - rest); };
      for (int64_t j = 0; j < a.v; j += kLanes)
        store_partial(dx + j, probability(load_partial(x + j, a.v - j)) * dloss, a.v - j);
      const Vec own = (probability(load_partial(x + label, 1)) - 1.0F) * dloss;
      store_partial(dx + label, own, 1);
    }
  });
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
