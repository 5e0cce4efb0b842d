// SIMD video instructions: vadd2 vsub2 vavrg2 vabsdiff2 vmin2 vmax2 vset2, and the same of 4, on
// all parts of a word in their order (selectors and masks on operands are not implemented).
#include <iterator>

#include "simulator/core/lanes.h"
#include "simulator/core/validity.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

enum class VideoOp : uint8_t {
  kAdd,
  kSub,
  kAverage,
  kDifference,
  kMin,
  kMax,
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe
};

// Instr::variant.
struct VideoForm {
  VideoOp op = VideoOp::kAdd;
  bool signed_a = false, signed_b = false, signed_d = false;
  bool saturate = false;
  bool sum = false;  // .add: the parts are added to c

  uint32_t pack() const {
    return uint32_t(op) | uint32_t{signed_a} << 8 | uint32_t{signed_b} << 9 |
           uint32_t{signed_d} << 10 | uint32_t{saturate} << 11 | uint32_t{sum} << 12;
  }
  static VideoForm unpack(uint32_t bits) {
    const auto flag = [bits](unsigned i) { return (bits >> i & 1) != 0; };
    return {VideoOp(bits & 0xff), flag(8), flag(9), flag(10), flag(11), flag(12)};
  }
};

int32_t apply(VideoOp op, int32_t a, int32_t b) {
  switch (op) {
    case VideoOp::kAdd: return a + b;
    case VideoOp::kSub: return a - b;
    case VideoOp::kAverage: return (a + b + (a + b >= 0 ? 1 : 0)) >> 1;
    case VideoOp::kDifference: return a < b ? b - a : a - b;
    case VideoOp::kMin: return a < b ? a : b;
    case VideoOp::kMax: return a > b ? a : b;
    case VideoOp::kEq: return a == b;
    case VideoOp::kNe: return a != b;
    case VideoOp::kLt: return a < b;
    case VideoOp::kLe: return a <= b;
    case VideoOp::kGt: return a > b;
    case VideoOp::kGe: return a >= b;
  }
  return 0;
}

template <int kParts>
int32_t part_of(uint32_t word, int i, bool has_sign) {
  constexpr int kWidth = 32 / kParts;
  const uint32_t top = word << (32 - kWidth * (i + 1));
  return has_sign ? int32_t(top) >> (32 - kWidth) : int32_t(top >> (32 - kWidth));
}

template <int kParts>
Step video(Warp& warp, const Instr& instr, LaneMask mask) {
  constexpr int kWidth = 32 / kParts;
  const VideoForm form = VideoForm::unpack(instr.variant);
  const int32_t least = form.signed_d ? -(1 << (kWidth - 1)) : 0;
  const int32_t most = form.signed_d ? (1 << (kWidth - 1)) - 1 : (1 << kWidth) - 1;
  const uint32_t* sources[3];
  for (int i = 0; i < 3; ++i) sources[i] = lanes_of<uint32_t>(warp, instr.source(i));
  uint32_t out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t result = form.sum ? sources[2][lane] : 0;
    for (int i = 0; i < kParts; ++i) {
      int32_t part = apply(form.op, part_of<kParts>(sources[0][lane], i, form.signed_a),
                           part_of<kParts>(sources[1][lane], i, form.signed_b));
      if (form.saturate) part = part < least ? least : part > most ? most : part;
      if (form.sum) {
        result += uint32_t(part);
      } else {
        result |= (uint32_t(part) & uint32_t((uint64_t{1} << kWidth) - 1)) << (kWidth * i);
      }
    }
    out[lane] = result;
  }
  LaneMask valid = valid_lanes(warp, instr.source(0)) & valid_lanes(warp, instr.source(1));
  if (form.sum) valid &= valid_lanes(warp, instr.source(2));  // otherwise nothing of c is left
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  set_valid(warp, instr.dest(0), mask, valid);
  return Step::kNext;
}

bool take_is_signed(Decoding& d) {
  const Type type = d.need_type();
  if (type != Type::kU32 && type != Type::kS32) refuse_malformed(d, "the types are .u32 or .s32");
  return type == Type::kS32;
}

VideoOp take_comparison(Decoding& d) {
  constexpr const char* kNames[] = {".eq", ".ne", ".lt", ".le", ".gt", ".ge"};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (d.take(kNames[i])) return VideoOp(size_t(VideoOp::kEq) + i);
  }
  refuse_malformed(d, "a comparison is missing");
}

template <VideoOp kOp, int kParts>
void decode_video(Decoding& d) {
  VideoForm form;
  form.op = kOp == VideoOp::kEq ? take_comparison(d) : kOp;
  form.saturate = d.take(".sat");
  form.sum = d.take(".add");
  if (kOp != VideoOp::kEq) form.signed_d = take_is_signed(d);
  form.signed_a = take_is_signed(d);
  form.signed_b = take_is_signed(d);
  take_operands(d, Type::kB32, 3);
  d.handler(video<kParts>, InstrClass::kInteger, kOwnValidity);
  d.instr().variant = form.pack();
}

constexpr Opcode kOpcodes[] = {
    {"vadd2", decode_video<VideoOp::kAdd, 2>},
    {"vadd4", decode_video<VideoOp::kAdd, 4>},
    {"vsub2", decode_video<VideoOp::kSub, 2>},
    {"vsub4", decode_video<VideoOp::kSub, 4>},
    {"vavrg2", decode_video<VideoOp::kAverage, 2>},
    {"vavrg4", decode_video<VideoOp::kAverage, 4>},
    {"vabsdiff2", decode_video<VideoOp::kDifference, 2>},
    {"vabsdiff4", decode_video<VideoOp::kDifference, 4>},
    {"vmin2", decode_video<VideoOp::kMin, 2>},
    {"vmin4", decode_video<VideoOp::kMin, 4>},
    {"vmax2", decode_video<VideoOp::kMax, 2>},
    {"vmax4", decode_video<VideoOp::kMax, 4>},
    {"vset2", decode_video<VideoOp::kEq, 2>},
    {"vset4", decode_video<VideoOp::kEq, 4>},
};

}  // namespace

const OpcodeFamily kVideoFamily = {"video", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
