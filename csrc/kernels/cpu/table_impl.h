// The remaining small passes and the table that an instruction set's file hands out.
#include "kernels/cpu/frozen_layers_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

// Sums of short sums, for the reason given at kChunkSteps.
inline void column_sum(const MatrixView& a, int64_t rows, int64_t c0, int64_t c1, void* out,
                       DType out_dtype) {
  for (int64_t j = c0; j < c1; j += kLanes) {
    Vec sum = {};
    with_dtype(a.dtype, [&](auto* type) {
      const auto* p = static_cast<decltype(type)>(a.data) + j;
      for (int64_t i0 = 0; i0 < rows; i0 += kChunkSteps) {
        Vec block = {};
        for (int64_t i = i0; i < rows && i < i0 + kChunkSteps; ++i)
          block += load_partial(p + i * a.row_stride, c1 - j);
        sum += block;
      }
    });
    with_dtype(out_dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      store_partial(static_cast<T*>(out) + j, sum, c1 - j);
    });
  }
}

inline void to_float(const MatrixView& src, int64_t rows, int64_t cols, float* dst,
                     int64_t dst_stride) {
  for (int64_t i = 0; i < rows; ++i)
    stage_a_float(src, MaskView{}, i, 1, 0, cols, dst + i * dst_stride);
}

inline void from_float(const float* src, int64_t src_stride, int64_t rows, int64_t cols, void* dst,
                       int64_t dst_stride, DType dtype) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    T* to = static_cast<T*>(dst);
    for (int64_t i = 0; i < rows; ++i, src += src_stride, to += dst_stride)
      for (int64_t j = 0; j < cols; j += kLanes)
        store_partial(to + j, load_partial(src + j, cols - j), cols - j);
  });
}

constexpr KernelTable kTable = {
    kPanel,
    tile_rows(kMaxVecs),
    FUSED_PEFT_BF16_DOT != 0,
    Scratch::kBytes,
    gemm_block,
    decode_block,
    dropout_row,
    transpose,
    column_sum,
    to_float,
    from_float,
    attention_padded_head_dim,
    attention_forward_scratch,
    attention_forward_block,
    attention_backward_scratch,
    attention_backward_block,
    rms_norm_rows,
    rms_norm_backward_rows,
    swiglu_range,
    swiglu_backward_range,
    cross_entropy_rows,
    cross_entropy_backward_rows,
};

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
