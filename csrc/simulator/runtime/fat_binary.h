// The PTX inside what nvcc embeds in a program (the .nv_fatbin section) or what cudaLibraryLoadData
// is given.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fused_peft::sim {

struct PtxImage {
  uint32_t sm = 0;        // 80, 90
  std::string_view text;  // points into the fat binary
};

// Every PTX text of a fat binary. `data` is a fat binary, the wrapper struct that
// __cudaRegisterFatBinary gets, or plain PTX text. Throws Unsupported where it holds no plain PTX:
// only machine code, or compressed PTX (nvcc --no-compress leaves it plain).
std::vector<PtxImage> read_fat_binary(const void* data);

// The newest one that a device of this compute capability (major * 10 + minor) can run; throws
// Unsupported if there is none.
const PtxImage& choose_image(const std::vector<PtxImage>& images, int device_sm);

}  // namespace fused_peft::sim
