// One thread's block of C = scale * (tail_mask * (s up) + A B) + bias + addend.
//
// Panels of B are packed (pack_impl.h), tiles of C stay in registers over a k block
// (microkernel_impl.h). The low-rank tail goes into the same accumulators, so the result is rounded
// once. Every element of C is computed by one thread in an order that does not depend on the number
// of threads.
#include "kernels/cpu/pack_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

// Steps of a k block; its packed panel takes steps * kPanel * 4 bytes of the L2 cache. Floats take
// shorter blocks, because each block is summed from zero and long float sums lose accuracy.
constexpr int64_t kPairSteps = 1024;
constexpr int64_t kFloatSteps = 256;
constexpr int64_t kBlockSteps = kPairSteps > kFloatSteps ? kPairSteps : kFloatSteps;

struct Scratch {
  static constexpr int64_t kBytesB = kBlockSteps * kPanel * 4;
  static constexpr int64_t kBytesUp = kMaxRank * kPanel * 4;
  static constexpr int64_t kBytesC = kMaxBlockRows * kPanel * 4;
  static constexpr int64_t kBytesA = kMaxTileRows * kBlockSteps * 4;
  static constexpr int64_t kBytesS = kMaxBlockRows * kMaxRank * 2;
  static constexpr int64_t kBytes = kBytesB + kBytesUp + kBytesC + kBytesA + kBytesS;

  float* b;     // [kBlockSteps, kPanel]
  float* up;    // [kMaxRank, kPanel]
  float* c;     // [kMaxBlockRows, kPanel]
  char* a;      // [kMaxTileRows, kBlockSteps] steps of 4 bytes
  BFloat16* s;  // [kMaxBlockRows, kMaxRank]

  explicit Scratch(char* memory)
      : b(reinterpret_cast<float*>(memory)),
        up(reinterpret_cast<float*>(memory + kBytesB)),
        c(reinterpret_cast<float*>(memory + kBytesB + kBytesUp)),
        a(memory + kBytesB + kBytesUp + kBytesC),
        s(reinterpret_cast<BFloat16*>(memory + kBytesB + kBytesUp + kBytesC + kBytesA)) {}
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

inline bool is_float(double scale) {
  return static_cast<double>(static_cast<float>(scale)) == scale;
}

using DoubleVec = double __attribute__((vector_size(kLanes * 8)));

inline DoubleVec widened(Vec v) { return __builtin_convertvector(v, DoubleVec); }

// A tile of C from its float sums c[rows, ldc]; bias holds the columns' biases as floats.
template <class T>
void write_tile_as(const Epilogue& e, const float* c, int64_t ldc, const float* bias, int64_t m0,
                   int64_t rows, int64_t n0, int64_t cols) {
  T* out = static_cast<T*>(e.out) + m0 * e.row_stride + n0 * e.col_stride;
  const T* addend = static_cast<const T*>(e.addend.data);
  if (addend) addend += m0 * e.addend.row_stride + n0;
  const bool scales_in_float = is_float(e.scale);
  const Vec scale = broadcast(static_cast<float>(e.scale));
  const int64_t full = e.col_stride == 1 ? cols / kLanes * kLanes : 0;
  for (int64_t i = 0; i < rows; ++i, c += ldc, out += e.row_stride) {
    const auto value = [&](int64_t j) {
      const Vec raw = load(c + j), b = load(bias + j);
      const Vec sum = scales_in_float
                          ? raw * scale + b
                          : __builtin_convertvector(widened(raw) * e.scale + widened(b), Vec);
      return addend ? sum + load_partial(addend + i * e.addend.row_stride + j, cols - j) : sum;
    };
    int64_t j = 0;
    for (; j < full; j += kLanes) store(out + j, value(j));
    for (; j < cols; j += kLanes) {
      T lanes[kLanes];
      store(lanes, value(j));
      const int64_t count = cols - j < kLanes ? cols - j : kLanes;
      for (int64_t l = 0; l < count; ++l) out[(j + l) * e.col_stride] = lanes[l];
    }
  }
}

inline void write_tile(const Epilogue& e, const float* c, int64_t ldc, const float* bias,
                       int64_t m0, int64_t rows, int64_t n0, int64_t cols) {
  with_dtype(e.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    write_tile_as<T>(e, c, ldc, bias, m0, rows, n0, cols);
  });
}

// Biases of columns [n0, n0 + cols) as floats, zero without one and up to a whole vector.
inline void load_bias(const MatrixView& bias, int64_t n0, int64_t cols, float* out) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    Vec v = {};
    if (bias.data)
      with_dtype(bias.dtype, [&](auto* type) {
        v = load_partial(static_cast<decltype(type)>(bias.data) + n0 + j, cols - j);
      });
    store(out + j, v);
  }
}

// The register tiles of one panel: for the full tile, and for the rows that are left at the end.
struct TileKernels {
  MicroKernel full, rest;
  int64_t full_rows;

  TileKernels(bool pairs, int64_t rows, int vecs)
      : full(kernel_for(pairs, tile_rows(vecs), vecs)),
        rest(kernel_for(pairs, static_cast<int>(rows % tile_rows(vecs)), vecs)),
        full_rows(tile_rows(vecs)) {}
  MicroKernel operator()(int64_t rows) const { return rows == full_rows ? full : rest; }
};

// Rows [m0, m1) of s in what multiplies the packed up: floats in place, or bfloat16 pairs, zero
// after an odd rank. As in a bfloat16 model, a bfloat16 adapter multiplies an s rounded to
// bfloat16.
inline RowsOfA rows_of_s(const Gemm& g, bool pairs, int64_t m0, int64_t m1, BFloat16* staged) {
  const float* s = g.s + m0 * g.r;
  if (!pairs) return {reinterpret_cast<const char*>(s), g.r * 4};
  const int64_t ld = (g.r + 1) / 2 * 2;
  BFloat16* out = staged;
  for (int64_t m = m0; m < m1; ++m, s += g.r, out += ld)
    for (int64_t k = 0; k < ld; k += kLanes)
      store_partial(out + k, load_partial(s + k, g.r - k), ld - k);
  return {reinterpret_cast<const char*>(staged), ld * 2};
}

inline void apply_tail_mask(const Gemm& g, int64_t m0, int64_t rows, int64_t n0, int vecs,
                            float* c) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t* bits = g.tail_mask.bits + (m0 + i) * g.tail_mask.row_words;
    for (int j = 0; j < vecs; ++j) {
      float* p = c + i * kPanel + j * kLanes;
      store(p, keep_lanes(load(p), mask_bits(bits, n0 + j * kLanes)));
    }
  }
}

// Columns [n0, n0 + cols) and steps of k [k0, k0 + k_size) of B, packed together.
struct Block {
  int64_t n0, cols, k0, k_size;
};

// Packing B pays when several register tiles use it. One or two tiles of rows (the gradients of the
// adapters) multiply its rows where they lie, converting as they go.
inline bool reads_b_in_place(const Gemm& g, bool pairs, int64_t rows, int64_t cols, int vecs) {
  return !pairs && !g.b_mask.bits && g.b.col_stride == 1 && cols == vecs * kLanes &&
         g.b.dtype != DType::kFloat16 && rows <= 2 * tile_rows(vecs);
}

// What every block of a task shares.
struct TaskContext {
  const Gemm& g;
  Scratch scratch;
  int64_t m0, m1;
  bool pairs, tail_pairs;
  RowsOfA s;
};

// Rows [m0, m1) of one panel for one k block. The first block of k starts C, the last adds the
// low-rank tail and writes it; a tail that is masked starts C.
inline void panel_block(const TaskContext& task, const Block& block, const Block& next) {
  const Gemm& g = task.g;
  const Scratch& scratch = task.scratch;
  const auto [n0, cols, k0, k_size] = block;
  const int vecs = static_cast<int>((cols + kLanes - 1) / kLanes);
  const bool first = k0 == 0;
  const bool last = k0 + k_size == g.k;
  const bool tail = g.r > 0 && (g.tail_mask.bits ? first : last);
  const TileKernels kernels(task.pairs, task.m1 - task.m0, vecs);
  const bool direct_b = reads_b_in_place(g, task.pairs, task.m1 - task.m0, cols, vecs);
  if (!direct_b) pack_b(g.b, g.b_mask, k0, k_size, n0, cols, vecs, task.pairs, scratch.b);
  if (tail) pack_b(g.up, MaskView{}, 0, g.r, n0, cols, vecs, task.tail_pairs, scratch.up);
  float bias[kPanel];
  load_bias(g.epilogue.bias, n0, cols, bias);
  // Tiles that one k block completes go from the registers to the output.
  const bool direct = first && last && cols == vecs * kLanes && g.epilogue.col_stride == 1 &&
                      !g.epilogue.addend.data && is_float(g.epilogue.scale);
  BlockPrefetch prefetch(g.b, next.k0, next.k_size, next.n0, next.cols,
                         (task.m1 - task.m0) / kernels.full_rows + 1);
  TileArgs args{};
  args.b = scratch.b;
  if (direct_b) {
    args.b_direct =
        static_cast<const char*>(g.b.data) + (k0 * g.b.row_stride + n0) * element_size(g.b.dtype);
    args.ldb = g.b.row_stride;
    args.b_dtype = g.b.dtype;
  }
  args.up = scratch.up;
  args.lds = task.s.stride_bytes;
  args.tail_pairs = task.tail_pairs;
  args.out_stride = g.epilogue.row_stride;
  args.out_dtype = g.epilogue.dtype;
  args.scale = static_cast<float>(g.epilogue.scale);
  args.bias = bias;
  const int64_t steps = task.pairs ? (k_size + 1) / 2 : k_size;
  const int64_t tail_steps = tail ? (task.tail_pairs ? (g.r + 1) / 2 : g.r) : 0;
  for (int64_t m = task.m0; m < task.m1; m += kernels.full_rows) {
    const int64_t rows = task.m1 - m < kernels.full_rows ? task.m1 - m : kernels.full_rows;
    prefetch.next_share();
    args.c = first && last ? scratch.c : scratch.c + (m - task.m0) * kPanel;
    args.s = task.s.data + (m - task.m0) * task.s.stride_bytes;
    args.accumulate = !first;
    args.tail_steps = tail_steps;
    if (tail && g.tail_mask.bits) {  // the mask falls between the two sums
      args.steps = 0;
      kernels(rows)(args);
      apply_tail_mask(g, m, rows, n0, vecs, args.c);
      args.accumulate = true;
      args.tail_steps = 0;
    }
    const RowsOfA a = rows_of_a(g, task.pairs, m, rows, k0, k_size, scratch.a);
    args.a = a.data;
    args.lda = a.stride_bytes;
    args.steps = steps;
    if (direct && !args.accumulate)
      args.out = static_cast<char*>(g.epilogue.out) +
                 (m * g.epilogue.row_stride + n0) * element_size(g.epilogue.dtype);
    kernels(rows)(args);
    if (last && !args.out) write_tile(g.epilogue, args.c, kPanel, bias, m, rows, n0, cols);
  }
}

inline void gemm_block(const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                       char* memory) {
  TaskContext task{g, Scratch(memory), m0, m1, multiplies_pairs(g), false, {}};
  task.tail_pairs = task.pairs && g.up.dtype == DType::kBFloat16;
  if (g.r > 0) task.s = rows_of_s(g, task.tail_pairs, m0, m1, task.scratch.s);
  const int64_t k_block = task.pairs ? 2 * kPairSteps : kFloatSteps;
  const auto block_at = [&](int64_t n, int64_t k) {
    return Block{n, n1 - n < kPanel ? n1 - n : kPanel, k, g.k - k < k_block ? g.k - k : k_block};
  };
  Block block = block_at(n0, 0);
  while (block.cols > 0) {
    Block next = block_at(block.n0, block.k0 + k_block);
    if (next.k_size <= 0) next = block_at(block.n0 + kPanel, 0);
    panel_block(task, block, next);
    block = next;
  }
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
