// Tensor maps (sm_90, TMA): how a kernel copies boxes of a matrix. Made on the host, passed by
// value.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/common.h"

namespace fused_peft::cuda {

constexpr int kSwizzledColumns = 64;  // 16-bit elements of a 128-byte swizzled line

// A row-major matrix that is copied in boxes of box_columns x box_rows. Boxes of 128-byte rows lie
// in shared memory at a multiple of 1024 bytes, 128-byte swizzled, boxes of 32-byte rows of 16-bit
// elements at a multiple of 256, 32-byte swizzled; others are dense. What a box has beyond the
// matrix is zero, and is not written back.
struct MatrixTiling {
  const void* data = nullptr;  // 16-byte aligned
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0;  // elements, a multiple of 16 bytes
  int32_t box_rows = 0;    // at most 256
  DType dtype = DType::kBFloat16;
  int32_t box_columns = kSwizzledColumns;
};

// kLaunchFailed where the driver has no tensor maps or refuses this one.
Status encode_tensor_map(const MatrixTiling& tiling, CUtensorMap* map);

}  // namespace fused_peft::cuda
