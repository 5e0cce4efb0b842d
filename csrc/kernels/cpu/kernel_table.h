// What each instruction set's file provides: blocks of work that the drivers in lora_linear.cpp
// spread over threads. Only plain types cross this line, so that no inline function of the standard
// library is compiled with an instruction set that the processor may lack.
#pragma once

#include <cstdint>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/frozen_layers.h"
#include "kernels/lora_linear.h"
#include "kernels/prefix_attention.h"

namespace fused_peft::cpu {

// Dropout mask as bits, 1 = kept: column j of row i is bit j % 64 of bits[i * row_words + j / 64].
struct MaskView {
  const uint64_t* bits = nullptr;
  int64_t row_words = 0;
};

// Where and how a tile of float sums is written: scale * sum + bias + addend, rounded once.
struct Epilogue {
  double scale = 1.0;  // not float: its rounding would be in every element alike
  MatrixView bias;     // [1, N], data may be null
  void* out = nullptr;
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0, col_stride = 1;
  MatrixView addend;  // [M, N] in dtype, col_stride 1; data may be null
};

// C[M, N] = scale * (tail_mask * (s up) + (a_mask * A) (b_mask * B)) + bias + addend.
// A is [M, K] with col_stride 1, B is [K, N] with either stride 1, s is [M, R] float contiguous.
struct Gemm {
  int64_t m = 0, n = 0, k = 0;  // k = 0: the low-rank tail alone
  MatrixView a, b;
  MaskView a_mask, b_mask;
  int64_t r = 0;  // 0: no low-rank tail
  const float* s = nullptr;
  MatrixView up;  // [R, N]
  MaskView tail_mask;
  Epilogue epilogue;
};

// y[M, N] = scale * (x weight^T + s lora_b^T) + bias for few rows: dot products along k, the
// weight read once and never repacked.
struct Decode {
  int64_t m = 0, n = 0, k = 0, r = 0;
  MatrixView x;              // [M, K], float, or bfloat16 where the instruction set multiplies it
  MatrixView weight;         // [N, K], col_stride 1
  const float* s = nullptr;  // [M, R] contiguous, null: no low-rank tail
  MatrixView lora_b;         // [N, R], col_stride 1
  Epilogue epilogue;
};

struct KernelTable {
  int panel;              // columns of a packed panel of B
  int row_tile;           // rows of C that a full panel's register tile holds
  bool bf16_dot;          // multiplies bfloat16 pairs directly
  int64_t scratch_bytes;  // per thread, for r <= kMaxRank
  // Computes rows [m0, m1) and columns [n0, n1) of C; n0 is a multiple of panel.
  // m1 - m0 <= kMaxBlockRows.
  void (*gemm_block)(const Gemm& gemm, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                     char* scratch);
  void (*decode_block)(const Decode& decode, int64_t n0, int64_t n1);
  void (*dropout_row)(uint64_t seed, uint32_t threshold, uint64_t first_element, int64_t columns,
                      uint64_t* bits);
  // dst[j * dst_stride + i] = src[i * src_stride + j]
  void (*transpose)(const float* src, int64_t src_stride, int64_t rows, int64_t cols, float* dst,
                    int64_t dst_stride);
  // out[j] = sum over i of a(i, j), in a fixed order
  void (*column_sum)(const MatrixView& a, int64_t rows, int64_t c0, int64_t c1, void* out,
                     DType out_dtype);
  // dst[i * dst_stride + j] = float(src(i, j)), src.col_stride 1
  void (*to_float)(const MatrixView& src, int64_t rows, int64_t cols, float* dst,
                   int64_t dst_stride);

  // dst(i, j) = src[i * src_stride + j], rounded to dtype
  void (*from_float)(const float* src, int64_t src_stride, int64_t rows, int64_t cols, void* dst,
                     int64_t dst_stride, DType dtype);

  // Floats from row to row of the sums of dk and dv.
  int64_t (*attention_padded_head_dim)(const PrefixAttentionParams& p);
  // Scratch of a forward block of so many queries; of any backward block.
  int64_t (*attention_forward_scratch)(const PrefixAttentionParams& p, int64_t queries);
  void (*attention_forward_block)(const PrefixAttentionForward& args,
                                  const AttentionForwardBlock& block, char* scratch);
  int64_t (*attention_backward_scratch)(const PrefixAttentionParams& p);
  void (*attention_backward_block)(const PrefixAttentionBackward& args,
                                   const AttentionBackwardBlock& block, char* scratch);

  // Rows [m0, m1), or elements [i0, i1).
  void (*rms_norm)(const RmsNorm& args, int64_t m0, int64_t m1);
  void (*rms_norm_backward)(const RmsNorm& args, int64_t m0, int64_t m1);
  void (*swiglu)(const SwiGlu& args, int64_t i0, int64_t i1);
  void (*swiglu_backward)(const SwiGlu& args, int64_t i0, int64_t i1);
  void (*cross_entropy)(const CrossEntropy& args, int64_t m0, int64_t m1);
  void (*cross_entropy_backward)(const CrossEntropy& args, int64_t m0, int64_t m1);
};

constexpr int64_t kMaxBlockRows = 512;
constexpr int64_t kDecodeRows = 16;

// Each is null where the file was not compiled for this architecture.
const KernelTable* kernels_portable();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
const KernelTable* kernels_avx512_bf16();

}  // namespace fused_peft::cpu
