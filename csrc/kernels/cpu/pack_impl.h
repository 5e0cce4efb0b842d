// Packing: a k block of B's panel into [steps, vecs * kLanes], converted to what the register tile
// multiplies, and rows of A where they cannot be read in place. A panel is packed once for up to
// kMaxBlockRows rows of A, which hides it: no second copy of the weight is ever kept.
#include "kernels/cpu/microkernel_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

// ---- B stored along n (element (k, n) at b + k * ld + n): rows are copied ----------------------

template <class T>
void pack_rows_float(const T* b, int64_t ld, int64_t steps, int64_t cols, int vecs,
                     const uint64_t* mask, int64_t mask_words, int64_t mask_column, float* out) {
  for (int64_t k = 0; k < steps; ++k, b += ld) {
    for (int j = 0; j < vecs; ++j, out += kLanes) {
      Vec v = load_partial(b + j * kLanes, cols - j * kLanes);
      if (mask) v = keep_lanes(v, mask_bits(mask + k * mask_words, mask_column + j * kLanes));
      store(out, v);
    }
  }
}

// ---- B stored along k (element (k, n) at b + n * ld + k): kLanes x kLanes blocks are transposed
// --

template <class T>
void pack_columns_float(const T* b, int64_t ld, int64_t steps, int64_t cols, int vecs, float* out) {
  for (int64_t k = 0; k < steps; k += kLanes) {
    for (int j = 0; j < vecs; ++j) {
      const T* from = b + j * kLanes * ld + k;
      Vec block[kLanes];
      if (cols - j * kLanes >= kLanes && steps - k >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * ld);
      } else {
        for (int i = 0; i < kLanes; ++i)
          block[i] = j * kLanes + i < cols ? load_partial(from + i * ld, steps - k) : Vec{};
      }
      transpose_block(block);
      const int64_t filled = steps - k < kLanes ? steps - k : kLanes;
      float* to = out + (k * vecs + j) * kLanes;
      for (int64_t i = 0; i < filled; ++i) store(to + i * vecs * kLanes, block[i]);
    }
  }
}

#if FUSED_PEFT_BF16_DOT

inline __m256i load_half_vector(const BFloat16* p, int64_t count) {
  if (count >= kLanes) return load_bits<__m256i>(p);
  if (count <= 0) return _mm256_setzero_si256();
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1U << count) - 1), p);
}

// Lane n of step i holds rows 2i (low half) and 2i + 1 (high half) of column n.
inline void pack_rows_pairs(const BFloat16* b, int64_t ld, int64_t k_size, int64_t cols, int vecs,
                            float* out) {
  for (int64_t k = 0; k < k_size; k += 2, b += 2 * ld) {
    const bool has_second = k + 1 < k_size;
    for (int j = 0; j < vecs; ++j, out += kLanes) {
      const int64_t count = cols - j * kLanes;
      const __m512i first = _mm512_cvtepu16_epi32(load_half_vector(b + j * kLanes, count));
      const __m512i second =
          _mm512_cvtepu16_epi32(load_half_vector(b + ld + j * kLanes, has_second ? count : 0));
      store_bits(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }
}

inline Vec load_pairs_partial(const BFloat16* p, int64_t count) {
  if (count >= 2 * kLanes) return load_bits<Vec>(p);
  const __mmask32 mask = (1U << count) - 1;
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p));
}

inline void pack_columns_pairs(const BFloat16* b, int64_t ld, int64_t k_size, int64_t cols,
                               int vecs, float* out) {
  const int64_t steps = (k_size + 1) / 2;
  for (int64_t step = 0; step < steps; step += kLanes) {
    const int64_t k = 2 * step;
    for (int j = 0; j < vecs; ++j) {
      const BFloat16* from = b + j * kLanes * ld + k;
      Vec block[kLanes];
      if (cols - j * kLanes >= kLanes && k_size - k >= 2 * kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load_bits<Vec>(from + i * ld);
      } else {
        for (int i = 0; i < kLanes; ++i)
          block[i] = j * kLanes + i < cols ? load_pairs_partial(from + i * ld, k_size - k) : Vec{};
      }
      transpose_block(block);
      const int64_t filled = steps - step < kLanes ? steps - step : kLanes;
      float* to = out + (step * vecs + j) * kLanes;
      for (int64_t i = 0; i < filled; ++i) store(to + i * vecs * kLanes, block[i]);
    }
  }
}

#endif  // FUSED_PEFT_BF16_DOT

// Packs B[k0 : k0 + k_size, n0 : n0 + cols] as floats or, with pairs, as bfloat16 pairs.
inline void pack_b(const MatrixView& b, const MaskView& mask, int64_t k0, int64_t k_size,
                   int64_t n0, int64_t cols, int vecs, bool pairs, float* out) {
  const bool along_n = b.col_stride == 1;
  const int64_t offset = k0 * b.row_stride + n0 * b.col_stride;
#if FUSED_PEFT_BF16_DOT
  if (pairs) {
    const auto* p = static_cast<const BFloat16*>(b.data) + offset;
    if (along_n) return pack_rows_pairs(p, b.row_stride, k_size, cols, vecs, out);
    return pack_columns_pairs(p, b.col_stride, k_size, cols, vecs, out);
  }
#else
  (void)pairs;
#endif
  const uint64_t* bits = mask.bits ? mask.bits + k0 * mask.row_words : nullptr;
  with_dtype(b.dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(b.data) + offset;
    if (along_n)
      pack_rows_float(p, b.row_stride, k_size, cols, vecs, bits, mask.row_words, n0, out);
    else
      pack_columns_float(p, b.col_stride, k_size, cols, vecs, out);
  });
}

// Brings a block of B that will be packed next into the L2 cache, a share with every register tile:
// rows of a large weight are far apart, which no hardware prefetcher follows.
class BlockPrefetch {
 public:
  BlockPrefetch() = default;
  BlockPrefetch(const MatrixView& b, int64_t k0, int64_t k_size, int64_t n0, int64_t cols,
                int64_t shares) {
    const bool along_n = b.col_stride == 1;
    const int64_t size = element_size(b.dtype);
    data_ = static_cast<const char*>(b.data) + (k0 * b.row_stride + n0 * b.col_stride) * size;
    run_stride_ = (along_n ? b.row_stride : b.col_stride) * size;
    lines_of_run_ = ((along_n ? cols : k_size) * size + kLineBytes - 1) / kLineBytes;
    lines_ = lines_of_run_ * (along_n ? k_size : cols);
    share_ = (lines_ + shares - 1) / shares;
  }

  void next_share() {
    for (int64_t end = lines_ < share_ ? 0 : lines_ - share_; lines_ > end; --lines_) {
      __builtin_prefetch(data_ + line_ * kLineBytes, 0, 2);
      if (++line_ == lines_of_run_) {
        line_ = 0;
        data_ += run_stride_;
      }
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const char* data_ = nullptr;
  int64_t run_stride_ = 0, lines_of_run_ = 1, line_ = 0;
  int64_t lines_ = 0, share_ = 0;
};

// dst(j, i) = src(i, j)
inline void transpose(const float* src, int64_t src_stride, int64_t rows, int64_t cols, float* dst,
                      int64_t dst_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t filled_rows = rows - i < kLanes ? rows - i : kLanes;
    for (int64_t j = 0; j < cols; j += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l)
        block[l] = l < filled_rows ? load_partial(src + (i + l) * src_stride + j, cols - j) : Vec{};
      transpose_block(block);
      const int64_t filled_cols = cols - j < kLanes ? cols - j : kLanes;
      for (int64_t l = 0; l < filled_cols; ++l)
        store_partial(dst + (j + l) * dst_stride + i, block[l], filled_rows);
    }
  }
}

// ---- rows of A ---------------------------------------------------------------------------------

// Rows as floats, the masked elements zero. k0 is a multiple of 64 where there is a mask.
inline void stage_a_float(const MatrixView& a, const MaskView& mask, int64_t m0, int64_t rows,
                          int64_t k0, int64_t k_size, float* out) {
  with_dtype(a.dtype, [&](auto* type) {
    for (int64_t i = 0; i < rows; ++i, out += k_size) {
      const auto* row = static_cast<decltype(type)>(a.data) + (m0 + i) * a.row_stride + k0;
      const uint64_t* bits = mask.bits ? mask.bits + (m0 + i) * mask.row_words : nullptr;
      for (int64_t k = 0; k < k_size; k += kLanes) {
        Vec v = load_partial(row + k, k_size - k);
        if (bits) v = keep_lanes(v, mask_bits(bits, k0 + k));
        store_partial(out + k, v, k_size - k);
      }
    }
  });
}

#if FUSED_PEFT_BF16_DOT
// Rows of pairs: zero after an odd end, the masked elements zero. ld counts elements, even.
inline void stage_a_pairs(const MatrixView& a, const MaskView& mask, int64_t m0, int64_t rows,
                          int64_t k0, int64_t k_size, BFloat16* out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, out += ld) {
    const auto* row = static_cast<const BFloat16*>(a.data) + (m0 + i) * a.row_stride + k0;
    for (int64_t k = 0; k < ld; k += 2 * kLanes) {
      const int64_t count = k_size - k;
      __mmask32 read = count >= 2 * kLanes ? ~0U : (1U << count) - 1;
      const __mmask32 written = ld - k >= 2 * kLanes ? ~0U : (1U << (ld - k)) - 1;
      if (mask.bits) {
        const uint64_t* bits = mask.bits + (m0 + i) * mask.row_words;
        read &= static_cast<uint32_t>(bits[(k0 + k) / 64] >> ((k0 + k) % 64));
      }
      _mm512_mask_storeu_epi16(out + k, written, _mm512_maskz_loadu_epi16(read, row + k));
    }
  }
}
#endif

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
