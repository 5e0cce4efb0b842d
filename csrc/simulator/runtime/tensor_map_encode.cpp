#include "simulator/runtime/tensor_map_encode.h"

#include <cuda.h>

#include <cstring>
#include <string>

#include "simulator/exec/tensor_map.h"
#include "simulator/runtime/process.h"

namespace fused_peft::sim {
namespace {

constexpr uint64_t kMaxStride = uint64_t{1} << 40;
constexpr uint64_t kMaxDim = uint64_t{1} << 32;
constexpr uint32_t kMaxBox = 256;
constexpr uint32_t kMaxElementStride = 8;

struct ElementType {
  CUtensorMapDataType name;
  uint8_t bytes;
  Type type;
};
constexpr ElementType kElementTypes[] = {
    {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, Type::kU8},
    {CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, Type::kU16},
    {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, Type::kU32},
    {CU_TENSOR_MAP_DATA_TYPE_INT32, 4, Type::kS32},
    {CU_TENSOR_MAP_DATA_TYPE_UINT64, 8, Type::kU64},
    {CU_TENSOR_MAP_DATA_TYPE_INT64, 8, Type::kS64},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, Type::kF16},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, Type::kF32},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 8, Type::kF64},
    {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, Type::kBF16},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ, 4, Type::kF32},
    {CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 4, Type::kF32},
    {CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ, 4, Type::kF32},
};

CUresult refuse(CUresult code, const std::string& why) {
  Process::get().last_message = "cuTensorMapEncodeTiled: " + why;
  return code;
}
CUresult invalid(const std::string& why) { return refuse(CUDA_ERROR_INVALID_VALUE, why); }

// What the driver's documentation asks of each dimension.
CUresult check_dimensions(const TensorMap& map, const cuuint64_t* dims, const cuuint64_t* strides,
                          const cuuint32_t* box, const cuuint32_t* element_strides) {
  for (int i = 0; i < map.rank; ++i) {
    const std::string which = " of dimension " + std::to_string(i) + " is ";
    if (dims[i] == 0 || dims[i] > kMaxDim)
      return invalid("globalDim" + which + std::to_string(dims[i]));
    if (box[i] == 0 || box[i] > kMaxBox)
      return invalid("boxDim" + which + std::to_string(box[i]) + ", not 1 to 256");
    if (element_strides[i] == 0 || element_strides[i] > kMaxElementStride) {
      return invalid("elementStrides" + which + std::to_string(element_strides[i]) +
                     ", not 1 to 8");
    }
    if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= kMaxStride)) {
      return invalid("globalStrides" + which + std::to_string(strides[i - 1]) +
                     ", not a multiple of 16 below 2^40");
    }
  }
  const uint64_t inner = uint64_t{box[0]} * map.element_bytes;
  if (inner % 16 != 0)
    return invalid("boxDim[0] has " + std::to_string(inner) + " bytes, not a multiple of 16");
  if (map.swizzle_bytes != 0 && inner > map.swizzle_bytes) {
    return invalid("boxDim[0] has " + std::to_string(inner) + " bytes, the swizzle spans " +
                   std::to_string(map.swizzle_bytes));
  }
  return CUDA_SUCCESS;
}

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  if (out == nullptr || reinterpret_cast<uint64_t>(out) % 64 != 0)
    return invalid("tensorMap is not a multiple of 64");
  if (rank < 1 || rank > TensorMap::kMaxRank)
    return invalid("tensorRank is " + std::to_string(rank) + ", not 1 to 5");
  if (address == nullptr || reinterpret_cast<uint64_t>(address) % 16 != 0) {
    return invalid("globalAddress is not a multiple of 16");
  }
  if (dims == nullptr || box == nullptr || element_strides == nullptr ||
      (rank > 1 && strides == nullptr)) {
    return invalid("a null pointer");
  }
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "interleaved layouts");
  TensorMap map;
  map.magic = TensorMap::kMagic;
  map.rank = uint8_t(rank);
  map.address = reinterpret_cast<uint64_t>(address);
  for (const ElementType& entry : kElementTypes) {
    if (entry.name == type) map.element_bytes = entry.bytes, map.type = entry.type;
  }
  if (map.element_bytes == 0) {
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensorDataType " + std::to_string(int(type)));
  }
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: break;
    case CU_TENSOR_MAP_SWIZZLE_32B: map.swizzle_bytes = 32; break;
    case CU_TENSOR_MAP_SWIZZLE_64B: map.swizzle_bytes = 64; break;
    case CU_TENSOR_MAP_SWIZZLE_128B: map.swizzle_bytes = 128; break;
    default: return refuse(CUDA_ERROR_NOT_SUPPORTED, "swizzle " + std::to_string(int(swizzle)));
  }
  map.fill_with_nan = fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
  if (map.fill_with_nan && !is_float(map.type)) return invalid("oobFill of NaN for integers");
  if (const CUresult code = check_dimensions(map, dims, strides, box, element_strides)) return code;
  for (uint32_t i = 0; i < rank; ++i) {
    map.dims[i] = dims[i];
    map.box[i] = uint16_t(box[i]);
    map.element_strides[i] = uint8_t(element_strides[i]);
    if (i > 0) map.strides[i - 1] = strides[i - 1];
  }
  std::memset(out, 0, sizeof *out);
  std::memcpy(static_cast<void*>(out), &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

void* tensor_map_encode_tiled() { return reinterpret_cast<void*>(&encode_tiled); }

}  // namespace fused_peft::sim
