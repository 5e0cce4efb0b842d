#include "simulator/runtime/fat_binary.h"

#include <algorithm>
#include <cstring>

#include "simulator/core/errors.h"

namespace fused_peft::sim {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kFatMagic = 0xba55ed50;
constexpr uint16_t kKindPtx = 1;
// Flags of an entry whose payload is compressed: LZ4 until CUDA 12, Zstandard since.
constexpr uint64_t kCompressedFlags = 0x2000 | 0x8000;

struct Wrapper {
  uint32_t magic, version;
  const void* data;
  void* filename_or_prelinked;
};

struct FatHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t payload_bytes;
};

// The part of an entry's header that is read here. Fields as observed in the output of nvcc 11
// to 13.
struct EntryHeader {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t payload_bytes;
  uint32_t compressed_bytes, options_offset;
  uint16_t minor, major;
  uint32_t arch;
  uint32_t name_offset, name_bytes;
  uint64_t flags;
};

uint32_t sm_of_text(std::string_view text) {
  const size_t at = text.find(".target sm_");
  uint32_t sm = 0;
  for (size_t i = at + 11; at != text.npos && i < text.size() && text[i] >= '0' && text[i] <= '9';
       ++i)
    sm = sm * 10 + uint32_t(text[i] - '0');
  return sm;
}

PtxImage plain_text(const char* text, size_t limit) {
  const std::string_view view(text, strnlen(text, limit));
  return {sm_of_text(view), view};
}

}  // namespace

std::vector<PtxImage> read_fat_binary(const void* data) {
  uint32_t magic;
  std::memcpy(&magic, data, sizeof magic);
  if (magic == kWrapperMagic) {
    Wrapper wrapper;
    std::memcpy(&wrapper, data, sizeof wrapper);
    data = wrapper.data;
    std::memcpy(&magic, data, sizeof magic);
  }
  if (magic != kFatMagic) {
    const char* text = static_cast<const char*>(data);
    if (std::memcmp(text,
                    "\x7f"
                    "ELF",
                    4) == 0)
      throw Unsupported(
          "a cubin (machine code): the simulator runs PTX; build with -gencode "
          "arch=compute_XX,code=compute_XX");
    return {plain_text(text, SIZE_MAX)};
  }
  FatHeader fat;
  std::memcpy(&fat, data, sizeof fat);
  const auto* at = static_cast<const char*>(data) + fat.header_bytes;
  const auto* end = at + fat.payload_bytes;
  std::vector<PtxImage> images;
  bool compressed = false;
  while (at + sizeof(EntryHeader) <= end) {
    EntryHeader entry;
    std::memcpy(&entry, at, sizeof entry);
    if (entry.kind == kKindPtx) {
      if (entry.flags & kCompressedFlags)
        compressed = true;
      else
        images.push_back(plain_text(at + entry.header_bytes, entry.payload_bytes));
    }
    if (entry.header_bytes < sizeof entry) break;
    at += entry.header_bytes + entry.payload_bytes;
  }
  if (images.empty())
    throw Unsupported(
        compressed
            ? "the fat binary's PTX is compressed: build with nvcc --no-compress"
            : "the fat binary holds no PTX: build with -gencode arch=compute_XX,code=compute_XX");
  return images;
}

const PtxImage& choose_image(const std::vector<PtxImage>& images, int device_sm) {
  const PtxImage* best = nullptr;
  std::string have;
  for (const PtxImage& image : images) {
    have += " sm_" + std::to_string(image.sm);
    if (image.sm <= uint32_t(device_sm) && (!best || image.sm > best->sm)) best = &image;
  }
  if (!best)
    throw Unsupported("no PTX for a device of compute capability " + std::to_string(device_sm) +
                      ": the program has" + have);
  return *best;
}

}  // namespace fused_peft::sim
