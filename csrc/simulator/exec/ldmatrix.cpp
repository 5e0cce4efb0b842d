// ldmatrix, stmatrix, movmatrix: 8 x 8 matrices of 16-bit elements between shared memory and
// fragments.
//
// Lane 8 i + r gives the address of row r of matrix i. In registers lane l holds elements 2 (l % 4)
// and the next of row l / 4; transposed, of column l / 4.
#include <iterator>

#include "simulator/core/lanes.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"
#include "simulator/exec/mma.h"
#include "simulator/exec/mma_fragments.h"

namespace fused_peft::sim {
namespace {

constexpr int kRowBytes = 16;

struct Matrix {
  __m128i row[8];
};

Matrix transposed(const Matrix& matrix) {
  Matrix out;
  transpose_halves(matrix.row, out.row);
  return out;
}

// Which elements are initialised; bit 8 row + column.
constexpr uint64_t kWholeMatrix = ~uint64_t{0};

uint64_t transpose_bits(uint64_t bits) {
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) out |= (bits >> (8 * i + j) & 1) << (8 * j + i);
  }
  return out;
}

// Lanes whose two elements are both set.
LaneMask lanes_of_elements(uint64_t elements) {
  LaneMask lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    lanes |= LaneMask((elements >> (2 * lane) & 3) == 3) << lane;
  return lanes;
}

// The rows' host addresses, by lane; nullptr where the checker has not let a row pass.
struct Rows {
  alignas(64) uint64_t address[kLanes];
  std::byte* host[kLanes] = {};
  Space space = Space::kShared;
  LaneMask valid = 0;
};

// Checks the row addresses of all the matrices' lanes.
Rows access_rows(Warp& warp, const Instr& instr, AccessKind kind, LaneMask lanes, LaneMask stored,
                 const std::byte* data) {
  const Operand& base = instr.source(0);
  Rows rows;
  lane_addresses(warp, base, instr.imm, rows.address);
  check_address(warp, instr, base, lanes);
  Checker& checker = *warp.cta->launch->checker;
  for_spaces(instr.variant ? Space::kShared : Space::kGeneric, rows.address, lanes,
             [&](Space space, LaneMask part) {
               LaneMask valid = 0;
               const Access access{space, kind, kRowBytes, part, rows.address, false, data};
               const LaneMask good = checker.access(warp, instr, access, stored, &valid);
               rows.space = space;
               rows.valid |= valid & good;
               host_addresses(warp, space, rows.address, good, rows.host);
             });
  return rows;
}

// Which elements of matrix i are initialised.
uint64_t valid_elements(Warp& warp, const Rows& rows, int i) {
  const LaneMask whole = rows.valid >> (8 * i) & 0xff;
  if (whole == 0xff) return kWholeMatrix;
  Checker& checker = *warp.cta->launch->checker;
  uint64_t elements = 0;
  for (int row = 0; row < 8; ++row) {
    const int lane = 8 * i + row;
    uint32_t bytes = (whole >> row & 1) ? 0xffff : 0;
    if (bytes == 0 && rows.host[lane] != nullptr) {
      bytes = checker.initialised_bytes(warp, rows.space, rows.address[lane], kRowBytes);
    }
    for (int j = 0; j < 8; ++j) elements |= uint64_t((bytes >> (2 * j) & 3) == 3) << (8 * row + j);
  }
  return elements;
}

LaneMask lanes_of_matrices(int count) {
  return count == 4 ? kFullMask : (LaneMask{1} << (8 * count)) - 1;
}

template <int kCount, bool kTranspose>
Step ldmatrix(Warp& warp, const Instr& instr, LaneMask mask) {
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  const LaneMask lanes = lanes_of_matrices(kCount) & mask;
  const Rows rows = access_rows(warp, instr, AccessKind::kRead, lanes, 0, nullptr);
  const LaneMask address_valid = valid_lanes(warp, instr.source(0));
  LaneMask valid[kCount];
  alignas(64) uint32_t out[kCount][kLanes];
  for (int i = 0; i < kCount; ++i) {
    Matrix matrix;
    for (int row = 0; row < 8; ++row) {
      const std::byte* host = rows.host[8 * i + row];
      if (host != nullptr) [[likely]] {
        std::memcpy(&matrix.row[row], host, kRowBytes);
      } else {
        matrix.row[row] = _mm_setzero_si128();
      }
    }
    if (kTranspose) matrix = transposed(matrix);
    std::memcpy(out[i], matrix.row, sizeof matrix);
    if (warp.valid == nullptr) continue;
    uint64_t elements = valid_elements(warp, rows, i);
    if (elements == kWholeMatrix && (~address_valid & lanes) == 0) [[likely]] {
      valid[i] = kFullMask;
      continue;
    }
    for (int row = 0; row < 8; ++row) {
      if (!(address_valid >> (8 * i + row) & 1)) elements &= ~(uint64_t{0xff} << (8 * row));
    }
    valid[i] = lanes_of_elements(kTranspose ? transpose_bits(elements) : elements);
  }
  const LaneMask guard = valid_guard(warp, instr);
  for (int i = 0; i < kCount; ++i) {
    store_lanes(dest_lanes<uint32_t>(warp, instr.dest(i)), out[i], mask);
    if (warp.valid != nullptr) set_valid(warp, instr.dest(i), mask, valid[i] & guard);
  }
  return Step::kNext;
}

template <int kCount, bool kTranspose>
Step stmatrix(Warp& warp, const Instr& instr, LaneMask mask) {
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  const LaneMask lanes = lanes_of_matrices(kCount) & mask;
  Matrix matrices[4] = {};
  LaneMask stored = 0;
  for (int i = 0; i < kCount; ++i) {
    std::memcpy(matrices[i].row, lanes_of<uint32_t>(warp, instr.source(1 + i)), sizeof(Matrix));
    if (kTranspose) matrices[i] = transposed(matrices[i]);
    const LaneMask valid = valid_lanes(warp, instr.source(1 + i));
    for (int row = 0; row < 8; ++row) {
      // Of a row four lanes hold the elements; transposed, one of the four in every group.
      const LaneMask holders = kTranspose ? 0x11111111u << (row / 2) : 0xfu << (4 * row);
      stored |= LaneMask((valid & holders) == holders) << (8 * i + row);
    }
  }
  const auto* data = reinterpret_cast<const std::byte*>(matrices);
  const Rows rows = access_rows(warp, instr, AccessKind::kWrite, lanes, stored, data);
  for (LaneMask left = lanes; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if (rows.host[lane] != nullptr)
      std::memcpy(rows.host[lane], data + kRowBytes * lane, kRowBytes);
  }
  warp.cta->progressed();
  return Step::kNext;
}

Step movmatrix(Warp& warp, const Instr& instr, LaneMask mask) {
  if (waits_for_lanes(warp, instr, mask)) return Step::kBlock;
  Matrix matrix;
  std::memcpy(matrix.row, lanes_of<uint32_t>(warp, instr.source(0)), sizeof matrix);
  matrix = transposed(matrix);
  uint32_t out[kLanes];
  std::memcpy(out, matrix.row, sizeof out);
  LaneMask valid = valid_lanes(warp, instr.source(0));
  uint64_t elements = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    elements |= ((valid >> lane & 1) ? uint64_t{3} : 0) << (2 * lane);
  valid = lanes_of_elements(transpose_bits(elements));
  store_lanes(dest_lanes<uint32_t>(warp, instr.dest(0)), out, mask);
  set_valid(warp, instr.dest(0), mask, valid);
  return Step::kNext;
}

struct Form {
  int count = 0;
  bool transpose = false;
};

// .sync.aligned.m8n8.xN{.trans}{.shared{::cta}}.b16
Form take_form(Decoding& d) {
  d.take(".sync");
  d.take(".aligned");
  if (!d.take(".m8n8")) refuse(d, "shapes other than .m8n8");
  const std::string_view count = d.take_one({".x1", ".x2", ".x4"});
  if (count.empty()) refuse_malformed(d, ".x1, .x2 or .x4 is missing");
  Form form{count[2] - '0', d.take(".trans")};
  const Space space = take_space(d);
  if (space != Space::kGeneric && space != Space::kShared)
    refuse_malformed(d, "the state space is .shared");
  if (!d.take(".b16")) refuse(d, "types other than .b16");
  d.instr().variant = space == Space::kShared;
  return form;
}

// {r0, ...}: one register may stand without braces.
void take_registers(Decoding& d, int count, bool dest) {
  const bool vector = d.next_operand() == OperandText::kVector;
  if (d.vector_length() != count) refuse_malformed(d, "as many registers as matrices are expected");
  if (vector) d.open_vector();
  for (int i = 0; i < count; ++i) dest ? d.dest(Type::kB32) : d.source(Type::kB32);
  if (vector) d.close_vector();
}

void decode_ldmatrix(Decoding& d) {
  const Form form = take_form(d);
  take_registers(d, form.count, true);
  d.address();
  Handler handler;
  switch (form.count) {
    case 1: handler = form.transpose ? ldmatrix<1, true> : ldmatrix<1, false>; break;
    case 2: handler = form.transpose ? ldmatrix<2, true> : ldmatrix<2, false>; break;
    default: handler = form.transpose ? ldmatrix<4, true> : ldmatrix<4, false>; break;
  }
  d.handler(handler, InstrClass::kMatrixLoad, kOwnValidity);
}

void decode_stmatrix(Decoding& d) {
  const Form form = take_form(d);
  d.address();
  take_registers(d, form.count, false);
  Handler handler;
  switch (form.count) {
    case 1: handler = form.transpose ? stmatrix<1, true> : stmatrix<1, false>; break;
    case 2: handler = form.transpose ? stmatrix<2, true> : stmatrix<2, false>; break;
    default: handler = form.transpose ? stmatrix<4, true> : stmatrix<4, false>; break;
  }
  d.handler(handler, InstrClass::kSharedStore);
}

void decode_movmatrix(Decoding& d) {
  d.take(".sync");
  d.take(".aligned");
  if (!d.take(".m8n8") || !d.take(".trans") || !d.take(".b16")) {
    refuse_malformed(d, "movmatrix is .m8n8.trans.b16");
  }
  take_operands(d, Type::kB32, 1);
  d.handler(movmatrix, InstrClass::kMove, kOwnValidity);
}

constexpr Opcode kOpcodes[] = {
    {"ldmatrix", decode_ldmatrix}, {"stmatrix", decode_stmatrix}, {"movmatrix", decode_movmatrix}};

}  // namespace

const OpcodeFamily kMatrixMoveFamily = {"matrix_move", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
