// One thread's block of C = scale * (tail_mask * (s up) + A B) + bias.
//
// Panels of B are packed (pack_impl.h), tiles of C stay in registers over a k block
// (microkernel_impl.h). The low-rank tail goes into the accumulators first, through the same
// register tile, so the result is rounded once. Every element of C is computed by one thread in an
// order that does not depend on the number of threads.
#include <type_traits>

#include "kernels/cpu/pack_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

// Steps of a k block: the packed panel then takes kBlockSteps * kPanel * 4 bytes of the L2 cache.
constexpr int64_t kBlockSteps = 1024;

struct Scratch {
  float* b;     // [kBlockSteps, kPanel]
  float* up;    // [kMaxRank, kPanel]
  float* c;     // [kMaxBlockRows, kPanel]
  char* a;      // [kMaxTileRows, kBlockSteps] steps of 4 bytes

  static constexpr int64_t kBytesB = kBlockSteps * kPanel * 4;
  static constexpr int64_t kBytesUp = kMaxRank * kPanel * 4;
  static constexpr int64_t kBytesC = kMaxBlockRows * kPanel * 4;
  static constexpr int64_t kBytesA = kMaxTileRows * kBlockSteps * 4;
  static constexpr int64_t kBytes = kBytesB + kBytesUp + kBytesC + kBytesA;

  explicit Scratch(char* memory)
      : b(reinterpret_cast<float*>(memory)),
        up(reinterpret_cast<float*>(memory + kBytesB)),
        c(reinterpret_cast<float*>(memory + kBytesB + kBytesUp)),
        a(memory + kBytesB + kBytesUp + kBytesC) {}
};

inline bool multiplies_pairs(const Gemm& g) {
  return FUSED_PEFT_BF16_DOT && g.a.dtype == DType::kBFloat16 && g.b.dtype == DType::kBFloat16 &&
         !g.b_mask.bits;
}

inline MicroKernel kernel_for(bool pairs, int rows, int vecs) {
#if FUSED_PEFT_BF16_DOT
  if (pairs) return micro_kernel_for<MultiplyBf16Pairs>(rows, vecs);
#else
  (void)pairs;
#endif
  return micro_kernel_for<MultiplyFloat>(rows, vecs);
}

// Where the register tile reads A: in place, or staged rows.
struct RowsOfA {
  const char* data;
  int64_t stride_bytes;
};

inline RowsOfA rows_of_a(const Gemm& g, bool pairs, int64_t m0, int64_t rows, int64_t k0,
                         int64_t k_size, char* staged) {
  const bool in_place = !g.a_mask.bits && (pairs ? k_size % 2 == 0 : g.a.dtype == DType::kFloat32);
  if (in_place) {
    const int64_t size = element_size(g.a.dtype);
    return {static_cast<const char*>(g.a.data) + (m0 * g.a.row_stride + k0) * size,
            g.a.row_stride * size};
  }
#if FUSED_PEFT_BF16_DOT
  if (pairs) {
    const int64_t ld = (k_size + 1) / 2 * 2;
    stage_a_pairs(g.a, g.a_mask, m0, rows, k0, k_size, reinterpret_cast<BFloat16*>(staged), ld);
    return {staged, ld * 2};
  }
#endif
  stage_a_float(g.a, g.a_mask, m0, rows, k0, k_size, reinterpret_cast<float*>(staged));
  return {staged, k_size * 4};
}

// A tile of C from its float sums c[rows, ldc].
template <class T>
void write_tile_as(const Epilogue& e, const float* c, int64_t ldc, int64_t m0, int64_t rows,
                   int64_t n0, int64_t cols) {
  T* out = static_cast<T*>(e.out) + m0 * e.row_stride + n0 * e.col_stride;
  const Vec scale = broadcast(e.scale);
  for (int64_t j = 0; j < cols; j += kLanes) {
    Vec bias = {};
    if (e.bias.data)
      with_dtype(e.bias.dtype, [&](auto* type) {
        bias = load_partial(static_cast<decltype(type)>(e.bias.data) + n0 + j, cols - j);
      });
    for (int64_t i = 0; i < rows; ++i) {
      const Vec v = load(c + i * ldc + j) * scale + bias;
      if (e.col_stride == 1) {
        store_partial(out + i * e.row_stride + j, v, cols - j);
      } else {
        T lanes[kLanes];
        store(lanes, v);
        const int64_t count = cols - j < kLanes ? cols - j : kLanes;
        for (int64_t l = 0; l < count; ++l)
          out[i * e.row_stride + (j + l) * e.col_stride] = lanes[l];
      }
    }
  }
}

inline void write_tile(const Epilogue& e, const float* c, int64_t ldc, int64_t m0, int64_t rows,
                       int64_t n0, int64_t cols) {
  with_dtype(e.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    write_tile_as<T>(e, c, ldc, m0, rows, n0, cols);
  });
}

inline void low_rank_tail(const Gemm& g, const float* up, int64_t m0, int64_t rows, int64_t n0,
                          int vecs, float* c) {
  const auto* s = reinterpret_cast<const char*>(g.s + m0 * g.r);
  kernel_for(false, static_cast<int>(rows), vecs)(s, g.r * 4, up, g.r, c, kPanel, false);
  if (!g.tail_mask.bits) return;
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t* bits = g.tail_mask.bits + (m0 + i) * g.tail_mask.row_words;
    for (int j = 0; j < vecs; ++j) {
      float* p = c + i * kPanel + j * kLanes;
      store(p, keep_lanes(load(p), mask_bits(bits, n0 + j * kLanes)));
    }
  }
}

// Rows [m0, m1) of one panel for one k block. The block's first step starts C, its last writes it.
inline void panel_block(const Gemm& g, const Scratch& scratch, bool pairs, int64_t m0, int64_t m1,
                        int64_t n0, int64_t cols, int64_t k0, int64_t k_size) {
  const int vecs = static_cast<int>((cols + kLanes - 1) / kLanes);
  const int64_t steps = pairs ? (k_size + 1) / 2 : k_size;
  const bool first = k0 == 0;
  const bool last = k0 + k_size == g.k;
  const bool tail = first && g.r > 0;
  pack_b(g.b, g.b_mask, k0, k_size, n0, cols, vecs, pairs, scratch.b);
  if (tail) pack_b(g.up, MaskView{}, 0, g.r, n0, cols, vecs, false, scratch.up);
  for (int64_t m = m0; m < m1; m += tile_rows(vecs)) {
    const int64_t rows = m1 - m < tile_rows(vecs) ? m1 - m : tile_rows(vecs);
    // A tile that one k block completes stays in the L1 cache; others wait in their own rows.
    float* c = first && last ? scratch.c : scratch.c + (m - m0) * kPanel;
    if (tail) low_rank_tail(g, scratch.up, m, rows, n0, vecs, c);
    const RowsOfA a = rows_of_a(g, pairs, m, rows, k0, k_size, scratch.a);
    kernel_for(pairs, static_cast<int>(rows), vecs)(a.data, a.stride_bytes, scratch.b, steps, c,
                                                    kPanel, tail || !first);
    if (last) write_tile(g.epilogue, c, kPanel, m, rows, n0, cols);
  }
}

inline void gemm_block(const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                       char* memory) {
  const Scratch scratch(memory);
  const bool pairs = multiplies_pairs(g);
  const int64_t k_block = pairs ? 2 * kBlockSteps : kBlockSteps;
  for (int64_t n = n0; n < n1; n += kPanel) {
    const int64_t cols = n1 - n < kPanel ? n1 - n : kPanel;
    for (int64_t k = 0; k < g.k; k += k_block)
      panel_block(g, scratch, pairs, m0, m1, n, cols, k, g.k - k < k_block ? g.k - k : k_block);
  }
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
