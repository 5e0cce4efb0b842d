// The register tile: C[rows, vecs * kLanes] (+)= A B over packed B, kept in registers for the whole
// k block. Two ways to multiply, the same data movement: a step is 4 bytes of A and one packed row
// of B, which is one k of floats or a pair of k of bfloat16.
#include <type_traits>

#include "kernels/cpu/simd_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

// Register budget: 32 vector registers hold 24 accumulators, 16 hold 12; the rest are for B and
// for A's broadcast.
#if FUSED_PEFT_VECTOR_BYTES == 64
constexpr int kMaxVecs = 3;
constexpr int kAccumulators = 24;
#else
constexpr int kMaxVecs = 2;
constexpr int kAccumulators = 12;
#endif
constexpr int kPanel = kMaxVecs * kLanes;
constexpr int kMaxTileRows = kAccumulators;

// Rows of the register tile for a panel of vecs vectors.
constexpr int tile_rows(int vecs) { return kAccumulators / vecs; }

struct MultiplyFloat {
  static Vec load_a(const char* a) {
    float value;
    std::memcpy(&value, a, 4);
    return broadcast(value);
  }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
};

#if FUSED_PEFT_BF16_DOT
// c += a.low * b.low + a.high * b.high in every lane, products and sums in float.
struct MultiplyBf16Pairs {
  static Vec load_a(const char* a) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return reinterpret_cast<Vec>(_mm512_set1_epi32(pair));
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// One register tile: sums = s up + a b, then either c (+)= sums, or out = scale * sums + bias.
struct TileArgs {
  const char* a;  // rows lda bytes apart, read 4 bytes a step
  int64_t lda;
  const float* b;  // [steps, kVecs * kLanes] packed
  int64_t steps;
  const void* b_direct;  // not null: B's own rows instead, ldb elements apart, floats or bfloat16
  int64_t ldb;
  DType b_dtype;

  const char* s;  // rows lds bytes apart; floats, or bfloat16 pairs
  int64_t lds;
  const float* up;  // [tail_steps, kVecs * kLanes] packed
  int64_t tail_steps;
  bool tail_pairs;

  float* c;  // rows kPanel floats apart
  bool accumulate;

  void* out;  // null: to c; else rows out_stride elements apart, whole vectors
  int64_t out_stride;
  DType out_dtype;
  float scale;
  const float* bias;
};

using MicroKernel = void (*)(const TileArgs& args);

// Where a step's columns of B come from: a packed panel, or rows of the matrix itself.
template <int kVecs>
struct PackedColumns {
  const float* p;
  Vec operator[](int j) const { return load(p + j * kLanes); }
  void advance() { p += kVecs * kLanes; }
};

template <class T>
struct DirectColumns {
  const T* p;
  int64_t ld;
  Vec operator[](int j) const { return load(p + j * kLanes); }
  void advance() { p += ld; }
};

// Advances a and columns over the steps.
template <class Multiply, class Columns, int kRows, int kVecs>
inline void multiply_steps(const char*& a, int64_t lda, Columns& columns, int64_t steps,
                           Vec (&acc)[kRows][kVecs]) {
  for (int64_t step = 0; step < steps; ++step, a += 4, columns.advance()) {
    Vec b[kVecs];
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) b[j] = columns[j];
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
      const Vec row = Multiply::load_a(a + i * lda);
#pragma GCC unroll 3
      for (int j = 0; j < kVecs; ++j) acc[i][j] = Multiply::fma(row, b[j], acc[i][j]);
    }
  }
}

template <class T, int kRows, int kVecs>
inline void write_registers(const TileArgs& args, const Vec (&acc)[kRows][kVecs]) {
  T* out = static_cast<T*>(args.out);
  const Vec scale = broadcast(args.scale);
  Vec bias[kVecs];
#pragma GCC unroll 3
  for (int j = 0; j < kVecs; ++j) bias[j] = load(args.bias + j * kLanes);
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j)
      store(out + i * args.out_stride + j * kLanes, acc[i][j] * scale + bias[j]);
}

template <int kRows, int kVecs>
inline void clear(Vec (&acc)[kRows][kVecs]) {
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec{};
}

// A float result keeps every rounding of its sum, so long sums are formed of short ones, each from
// zero: the error then grows with the root of kChunkSteps plus the number of chunks. The low-rank
// tail is a sum of its own, since either can be much larger than the other, whose chunks would all
// be rounded to its size. A bfloat16 result hides that under its own rounding.
constexpr int64_t kChunkSteps = 16;

template <class Columns, int kRows, int kVecs>
inline void multiply_chunks(const char* a, int64_t lda, Columns columns, int64_t steps,
                            Vec (&acc)[kRows][kVecs], Vec (&sum)[kRows][kVecs]) {
  for (; steps > 0; steps -= kChunkSteps) {
    clear(acc);
    multiply_steps<MultiplyFloat>(a, lda, columns, steps < kChunkSteps ? steps : kChunkSteps, acc);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] += acc[i][j];
  }
}

// The low-rank tail, out of line: its accumulators must not take registers from the loop over k.
template <int kRows, int kVecs>
__attribute__((noinline)) void sum_tail(const TileArgs& args, Vec (&tail)[kRows][kVecs]) {
  Vec acc[kRows][kVecs];
  clear(tail);
  multiply_chunks(args.s, args.lds, PackedColumns<kVecs>{args.up}, args.tail_steps, acc, tail);
}

template <int kRows, int kVecs>
inline void sum_floats(const TileArgs& args, Vec (&acc)[kRows][kVecs]) {
  Vec sum[kRows][kVecs];
  clear(sum);
  if (!args.b_direct)
    multiply_chunks(args.a, args.lda, PackedColumns<kVecs>{args.b}, args.steps, acc, sum);
  else if (args.b_dtype == DType::kBFloat16)
    multiply_chunks(args.a, args.lda,
                    DirectColumns<BFloat16>{static_cast<const BFloat16*>(args.b_direct), args.ldb},
                    args.steps, acc, sum);
  else
    multiply_chunks(args.a, args.lda,
                    DirectColumns<float>{static_cast<const float*>(args.b_direct), args.ldb},
                    args.steps, acc, sum);
  if (args.tail_steps > 0) {
    Vec tail[kRows][kVecs];
    sum_tail(args, tail);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] += tail[i][j];
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) acc[i][j] = sum[i][j];
}

template <class Multiply, int kRows, int kVecs>
inline void sum_pairs(const TileArgs& args, Vec (&acc)[kRows][kVecs]) {
  const char* s = args.s;
  const char* a = args.a;
  PackedColumns<kVecs> up{args.up}, b{args.b};
  if (args.tail_pairs)
    multiply_steps<Multiply>(s, args.lds, up, args.tail_steps, acc);
  else
    multiply_steps<MultiplyFloat>(s, args.lds, up, args.tail_steps, acc);
  multiply_steps<Multiply>(a, args.lda, b, args.steps, acc);
}

template <class Multiply, int kRows, int kVecs>
void micro_kernel(const TileArgs& args) {
  Vec acc[kRows][kVecs];
  clear(acc);
  if constexpr (std::is_same_v<Multiply, MultiplyFloat>)
    sum_floats(args, acc);
  else
    sum_pairs<Multiply>(args, acc);
  if (args.out) {
    with_dtype(args.out_dtype, [&](auto* type) {
      write_registers<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(args, acc);
    });
    return;
  }
  // A k block sums from zero and is added once: blockwise summation keeps the error of long sums
  // down and costs one pass over C.
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) {
      float* to = args.c + i * kPanel + j * kLanes;
      store(to, args.accumulate ? load(to) + acc[i][j] : acc[i][j]);
    }
}

// The kernel for a tile of 1 <= rows < tile_rows(vecs), the full one for any other number: found by
// walking the template arguments.
template <class Multiply, int kVecs, int kRows = 1>
MicroKernel micro_kernel_for_rows(int rows) {
  if constexpr (kRows == tile_rows(kVecs)) {
    return micro_kernel<Multiply, kRows, kVecs>;
  } else {
    if (rows == kRows) return micro_kernel<Multiply, kRows, kVecs>;
    return micro_kernel_for_rows<Multiply, kVecs, kRows + 1>(rows);
  }
}

template <class Multiply>
MicroKernel micro_kernel_for(int rows, int vecs) {
  if (vecs == 1) return micro_kernel_for_rows<Multiply, 1>(rows);
  if (vecs == 2) return micro_kernel_for_rows<Multiply, 2>(rows);
  return micro_kernel_for_rows<Multiply, kMaxVecs>(rows);
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
