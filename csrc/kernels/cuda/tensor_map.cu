#include "kernels/cuda/tensor_map.h"

#include <cuda_runtime.h>

namespace fused_peft::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function by way of the runtime: the package does not link libcuda, which a machine
// without a GPU lacks.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kFirstWithTensorMaps = 12000;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kFirstWithTensorMaps,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

Status encode_tensor_map(const MatrixTiling& t, CUtensorMap* map) {
  static const Encode encode = find_encode();
  if (!encode) return Status::kLaunchFailed;
  const cuuint64_t sizes[2] = {cuuint64_t(t.columns), cuuint64_t(t.rows)};
  const cuuint64_t row_bytes[1] = {cuuint64_t(t.row_stride * element_size(t.dtype))};
  const cuuint32_t box[2] = {cuuint32_t(t.box_columns), cuuint32_t(t.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type = t.dtype == DType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : t.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int64_t line = t.box_columns * element_size(t.dtype);
  const CUtensorMapSwizzle swizzle = line == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : line == 32 && t.dtype != DType::kFloat32
                                         ? CU_TENSOR_MAP_SWIZZLE_32B
                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(t.data), sizes, row_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace fused_peft::cuda
