// Swizzled tiles of 16-bit elements in shared memory, and how they are filled from global memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.cuh"
#include "kernels/ptx/async_copy.cuh"
#include "kernels/ptx/ldmatrix.cuh"

namespace fused_peft::cuda {

constexpr int kChunk = 8;  // elements of a 16-byte chunk

// Byte offset of a chunk in a tile whose rows have kCols elements. The chunk is exclusive-ored with
// the row so that the eight rows that one phase of ldmatrix reads, and the eight that a quarter
// warp writes, lie in different banks.
template <int kCols>
__device__ inline uint32_t tile_offset(int row, int chunk) {
  constexpr int kChunks = kCols / kChunk;
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0);
  constexpr int kRowsPerLine =
      kChunks >= 8 ? 1 : 8 / kChunks;  // rows in the 128 bytes that the banks span
  constexpr int kMask = (kChunks >= 8 ? 8 : kChunks) - 1;
  return static_cast<uint32_t>(row * kCols * 2 + ((chunk ^ ((row / kRowsPerLine) & kMask)) * 16));
}

// Fragment addresses. All give lane `lane` the row it must name in ldmatrix_x4.
//
// A operand, 16 rows by 16 k, tile [rows][k].
template <int kCols>
__device__ inline uint32_t a_fragment(int row, int k, int lane) {
  return tile_offset<kCols>(row + (lane & 15), k / kChunk + (lane >> 4));
}
// A operand, 16 rows by 16 k, tile [k][rows]: ldmatrix_x4_trans.
template <int kCols>
__device__ inline uint32_t a_fragment_trans(int row, int k, int lane) {
  return tile_offset<kCols>(k + (lane & 7) + ((lane >> 4) << 3), row / kChunk + ((lane >> 3) & 1));
}
// B operand, 16 columns by 16 k, tile [columns][k]: registers 0, 1 are the first 8 columns, 2, 3
// the next.
template <int kCols>
__device__ inline uint32_t b_fragment(int column, int k, int lane) {
  return tile_offset<kCols>(column + (lane & 7) + ((lane >> 4) << 3),
                            k / kChunk + ((lane >> 3) & 1));
}
// The same from a tile [k][columns]: ldmatrix_x4_trans.
template <int kCols>
__device__ inline uint32_t b_fragment_trans(int column, int k, int lane) {
  return tile_offset<kCols>(k + (lane & 15), column / kChunk + (lane >> 4));
}

// Eight consecutive elements of which the first `valid` exist; zeros for the others. One 16-byte
// load where the address allows it.
template <class Element>
__device__ inline uint4 load_chunk(const Element* pointer, int64_t valid, bool aligned) {
  if (aligned && valid >= kChunk) return __ldg(reinterpret_cast<const uint4*>(pointer));
  uint4 chunk = {0, 0, 0, 0};
  uint16_t bits[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    bits[i] = i < valid ? __ldg(reinterpret_cast<const uint16_t*>(pointer) + i) : uint16_t{0};
  uint32_t* words = &chunk.x;
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i)
    words[i] = uint32_t{bits[2 * i]} | uint32_t{bits[2 * i + 1]} << 16;
  return chunk;
}

__device__ inline void store_shared(uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Fills one chunk of a tile: asynchronously where the operand is aligned (every chunk is then whole
// or absent), else element by element. `valid`: how many elements of the row exist from this chunk
// on.
template <class Element>
__device__ inline void fill_chunk(uint32_t shared, const Element* pointer, int64_t valid,
                                  bool aligned) {
  if (aligned)
    ptx::cp_async_16(shared, pointer, valid > 0);
  else
    store_shared(shared, load_chunk(pointer, valid, false));
}

}  // namespace fused_peft::cuda
