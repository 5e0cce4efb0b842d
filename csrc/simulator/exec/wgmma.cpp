// wgmma.mma_async: D (64 x n) += A B of a warpgroup, A in shared memory or registers, B in shared
// memory.
//
// Each warp computes its 16 rows. Accumulation is as mma.cpp says.
#include "simulator/exec/wgmma.h"

#include <cstdio>
#include <iterator>

#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/memory_form.h"
#include "simulator/exec/mma_accumulators.h"
#include "simulator/exec/mma_elements.h"
#include "simulator/exec/mma_multiply.h"
#include "simulator/exec/wgmma_descriptor.h"

namespace fused_peft::sim {
namespace {

constexpr uint32_t kChunkBytes = 16;
constexpr int kRows = 16;  // of D, of one warp

// 16 rows of 32 bytes of an operand in shared memory, from row `first` on, to [chunk][row] pieces
// of 16 bytes where `pieces` rows belong together (16 of A, 8 of B). Returns a bit for each row:
// initialised.
uint32_t read_rows(Warp& warp, const Instr& instr, const MatrixDescriptor& matrix, bool mn_major,
                   uint32_t first, uint32_t rows, uint32_t pieces, std::byte* out) {
  if (matrix.base_offset() != 0) throw Unsupported("wgmma: a matrix descriptor with a base offset");
  uint64_t address[kLanes] = {};
  LaneMask lanes = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t inner = lane % 16, outer = lane / 16;
    if ((mn_major ? 8 * outer : inner) >= rows) continue;
    lanes |= LaneMask{1} << lane;
    address[lane] = mn_major ? matrix.chunk_of_k(inner, first / 8 + outer)
                             : matrix.chunk_of_row(first + inner, outer);
  }
  LaneMask valid = 0;
  Access access{Space::kShared, AccessKind::kRead, kChunkBytes, lanes, address};
  access.async_proxy = true;
  const LaneMask good = warp.cta->launch->checker->access(warp, instr, access, 0, &valid);
  std::byte* host[kLanes] = {};
  host_addresses(warp, Space::kShared, address, good, host);
  const auto row_at = [&](uint32_t lane) {
    return host[lane] == nullptr ? _mm_setzero_si128()
                                 : _mm_loadu_si128(reinterpret_cast<const __m128i*>(host[lane]));
  };
  const auto piece = [&](uint32_t row, uint32_t chunk) {
    return reinterpret_cast<__m128i*>(out) + (row / pieces * 2 + chunk) * pieces + row % pieces;
  };
  for (uint32_t block = 0; block < rows / 8; ++block) {
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      __m128i source[8];
      for (uint32_t i = 0; i < 8; ++i)
        source[i] = row_at(mn_major ? 16 * block + 8 * chunk + i : 16 * chunk + 8 * block + i);
      if (mn_major) {
        transpose_halves(source, piece(8 * block, chunk));
      } else {
        std::memcpy(piece(8 * block, chunk), source, sizeof source);
      }
    }
  }
  valid |= ~lanes;
  if (!mn_major) return valid & valid >> 16 & 0xffff;
  return ((valid & 0xffff) == 0xffff ? 0xff : 0) | (valid >> 16 == 0xffff ? 0xff00 : 0);
}

// Lanes that hold rows whose bits are set: of four lanes each.
LaneMask lanes_of_rows(uint32_t rows) { return _pdep_u32(rows, 0x11111111u) * 15; }

// A of one warp as floats, and per half of its rows the lanes that are initialised.
template <class A>
void load_a(Warp& warp, const WgmmaOperation& operation, float* a, LaneMask valid[2]) {
  const Instr& instr = *operation.instr;
  const WgmmaForm& form = wgmma_form(instr);
  constexpr int kValues = kLanes * A::kPerRegister;
  if (form.registers_a) {
    for (int i = 0; i < 4; ++i)
      A::load(lanes_of<uint32_t>(warp, instr.source(i)), a + i * kValues, kLanes);
    for (int half = 0; half < 2; ++half) {
      const LaneMask both =
          valid_lanes(warp, instr.source(half)) & valid_lanes(warp, instr.source(half + 2));
      valid[half] = whole_groups(both) * 15;
    }
  } else {
    alignas(64) uint32_t raw[4 * kLanes];
    const uint32_t rows =
        read_rows(warp, instr, MatrixDescriptor(operation.a), form.transpose_a,
                  warp.index % 4 * kRows, kRows, kRows, reinterpret_cast<std::byte*>(raw));
    for (int i = 0; i < 4; ++i) A::load(raw + i * kLanes, a + i * kValues, kLanes);
    for (int half = 0; half < 2; ++half) valid[half] = lanes_of_rows(rows >> (8 * half) & 0xff);
  }
  if (form.negate) {
    for (int i = 0; i < 4 * kValues; ++i) a[i] = -a[i];
  }
}

template <class B>
void read_b(Warp& warp, const WgmmaOperation& operation, OperandTile& tile) {
  constexpr int kWidth = 4 * B::kPerRegister, kValues = kLanes * B::kPerRegister;
  const WgmmaForm& form = wgmma_form(*operation.instr);
  const MatrixDescriptor matrix(operation.b);
  tile.descriptor = operation.b;
  tile.rows.resize(size_t(form.n) / 8 * 2 * kWidth);
  for (uint32_t first = 0; first < form.n; first += 16) {
    alignas(64) uint32_t raw[4 * kLanes];
    const uint32_t rows = form.n - first < 16 ? form.n - first : 16;
    const uint32_t valid = read_rows(warp, *operation.instr, matrix, form.transpose_b, first, rows,
                                     8, reinterpret_cast<std::byte*>(raw));
    for (uint32_t block = 0; block < rows / 8; ++block) {
      alignas(64) float columns[2 * kValues];
      for (uint32_t i = 0; i < 2; ++i)
        B::load(raw + (2 * block + i) * kLanes, columns + i * kValues, kLanes);
      __m256 transposed[2 * kWidth];
      to_rows<2, kWidth>(columns, transposed);
      std::memcpy(&tile.rows[size_t(first / 8 + block) * 2 * kWidth], transposed,
                  sizeof transposed);
      const LaneMask initialised = _pdep_u32(valid >> (8 * block) & 0xff, 0x11111111u);
      for (const bool odd : {false, true}) {
        tile.valid[first / 8 + block][odd] = lanes_of_columns(initialised, odd);
      }
    }
  }
}

// Reads B for the first of the four warps.
template <class B>
OperandTile& tile_of(Warp& warp, const WgmmaOperation& operation) {
  OperandTile& tile = wgmma_of(warpgroup_leader(warp)).tiles[operation.sequence];
  if (tile.users++ == 0) {
    read_b<B>(warp, operation, tile);
  } else if (tile.descriptor != operation.b) {
    warp.cta->launch->checker->report(
        warp, *operation.instr, kFullMask, FindingKind::kOther,
        "the descriptor of B differs between the warps of the warpgroup");
    read_b<B>(warp, operation, tile);
  }
  return tile;
}

template <class A, class B, class Accumulator>
void execute(Warp& warp, const WgmmaOperation& operation) {
  static_assert(A::kPerRegister == B::kPerRegister);
  constexpr int kWidth = 4 * A::kPerRegister;
  const Instr& instr = *operation.instr;
  const WgmmaForm& form = wgmma_form(instr);
  alignas(64) float a[kRows * 2 * kWidth];
  LaneMask rows[2];
  load_a<A>(warp, operation, a, rows);
  const OperandTile& tile = tile_of<B>(warp, operation);
  for (uint32_t block = 0; block < form.n / 8; ++block) {
    const Operand* d = &instr.dest(int(block) * Accumulator::kRegisters);
    const Operand* c = operation.accumulates ? d : nullptr;
    alignas(64) float sums[kRows * 8];
    c != nullptr ? Accumulator::load(warp, c, sums) : void(std::memset(sums, 0, sizeof sums));
    const auto* b = reinterpret_cast<const __m256*>(&tile.rows[size_t(block) * 2 * kWidth]);
    accumulate<kRows, 2, kWidth>(a, b, sums);
    Accumulator::store(warp, d, c, kFullMask, sums);
    if (warp.valid == nullptr) continue;
    const auto [even, odd] = tile.valid[block];
    for (int i = 0; i < Accumulator::kRegisters; ++i) {
      LaneMask valid = operation.valid & rows[Accumulator::kPairs ? i : i / 2];
      valid &= Accumulator::kPairs ? even & odd : i % 2 == 0 ? even : odd;
      if (operation.accumulates) valid &= valid_lanes(warp, d[i]);
      set_valid(warp, d[i], kFullMask, valid);
    }
  }
  if (tile.users == 4) wgmma_of(warpgroup_leader(warp)).tiles.erase(operation.sequence);
}

// ---- decode

using Execute = void (*)(Warp&, const WgmmaOperation&);

struct Types {
  Type d = Type::kNone;
  std::string_view a, b;
};

template <class First, class Second, class Fn>
Execute with_pair(const Types& types, std::string_view second, Fn fn) {
  if (types.a == second) return types.b == second ? fn(Second{}, Second{}) : fn(Second{}, First{});
  return types.b == second ? fn(First{}, Second{}) : fn(First{}, First{});
}

// nullptr where the types do not go together.
Execute choose(const Types& types, bool satfinite) {
  const auto floats = [&]<class A, class B>(A, B) -> Execute {
    return types.d == Type::kF32 ? execute<A, B, F32Accumulator<kRows>>
                                 : execute<A, B, F16Accumulator<kRows>>;
  };
  const auto integers = [&]<class A, class B>(A, B) -> Execute {
    return satfinite ? execute<A, B, S32Accumulator<kRows, true>>
                     : execute<A, B, S32Accumulator<kRows, false>>;
  };
  const auto are = [&](std::string_view one, std::string_view other) {
    return (types.a == one || types.a == other) && (types.b == one || types.b == other);
  };
  if (types.d == Type::kS32) {
    return are(".s8", ".u8") ? with_pair<S8Elements, U8Elements>(types, ".u8", integers) : nullptr;
  }
  if (satfinite || (types.d != Type::kF32 && types.d != Type::kF16)) return nullptr;
  if (are(".e4m3", ".e5m2")) return with_pair<E4M3Elements, E5M2Elements>(types, ".e5m2", floats);
  if (are(".f16", ".f16")) return floats(F16Elements{}, F16Elements{});
  if (types.d == Type::kF16) return nullptr;
  if (are(".bf16", ".bf16")) return floats(BF16Elements{}, BF16Elements{});
  return are(".tf32", ".tf32") ? floats(TF32Elements{}, TF32Elements{}) : nullptr;
}

// .m64nNkK; false if there is none.
bool take_shape(Decoding& d, uint32_t* n, uint32_t* k) {
  for (*n = 8; *n <= 256; *n += 8) {
    for (const uint32_t candidate : {8u, 16u, 32u}) {
      char name[24];
      std::snprintf(name, sizeof name, ".m64n%uk%u", *n, candidate);
      *k = candidate;
      if (d.take(name)) return true;
    }
  }
  return false;
}

uint32_t k_of(std::string_view type) {
  if (type == ".tf32") return 8;
  return type == ".f16" || type == ".bf16" ? 16 : 32;
}

void take_matrices(Decoding& d, WgmmaForm& form, Type type_d) {
  const uint32_t count = form.n / (type_d == Type::kF16 ? 4 : 2);
  if (d.vector_length() != int(count))
    refuse_malformed(d, "D takes " + std::to_string(count) + " registers");
  d.open_vector();
  for (uint32_t i = 0; i < count; ++i) d.dest(type_d == Type::kF16 ? Type::kB32 : type_d);
  d.close_vector();
  form.registers_a = d.next_operand() == OperandText::kVector;
  if (form.registers_a) {
    if (d.vector_length() != 4) refuse_malformed(d, "A takes 4 registers");
    d.open_vector();
    for (int i = 0; i < 4; ++i) d.source(Type::kB32);
    d.close_vector();
  } else {
    d.source(Type::kB64);
  }
  d.source(Type::kB64);
  d.source(Type::kPred);
}

int64_t take_immediate(Decoding& d, std::initializer_list<int64_t> allowed, const char* what) {
  const int64_t value = d.immediate();
  for (const int64_t candidate : allowed) {
    if (value == candidate) return value;
  }
  refuse_malformed(d, std::string(what) + " has no such value");
}

void decode_wgmma(Decoding& d) {
  if (decode_wgmma_order(d)) return;
  if (!d.take(".mma_async")) refuse(d, "this wgmma");
  if (d.has(".sp")) refuse(d, "sparse wgmma");
  d.take(".sync");
  d.take(".aligned");
  auto form = std::make_shared<WgmmaForm>();
  uint32_t k = 0;
  if (!take_shape(d, &form->n, &k)) refuse(d, "this shape");
  const bool satfinite = d.take(".satfinite");
  Types types;
  types.d = d.need_type();
  const auto take = [&d] {
    return d.take_one({".f16", ".bf16", ".tf32", ".e4m3", ".e5m2", ".s8", ".u8"});
  };
  types.a = take();
  types.b = take();
  form->execute = choose(types, satfinite);
  if (form->execute == nullptr || k != k_of(types.a)) refuse(d, "these types of this shape");
  take_matrices(d, *form, types.d);
  if (types.d != Type::kS32) {
    const int64_t scale_a = take_immediate(d, {1, -1}, "imm-scale-a");
    form->negate = scale_a * take_immediate(d, {1, -1}, "imm-scale-b") < 0;
  }
  if (k == 16) {
    if (!form->registers_a) form->transpose_a = take_immediate(d, {0, 1}, "imm-trans-a") != 0;
    form->transpose_b = take_immediate(d, {0, 1}, "imm-trans-b") != 0;
  }
  d.keep(form);
  d.handler(issue_wgmma, InstrClass::kTensor, kOwnValidity);
}

constexpr Opcode kOpcodes[] = {{"wgmma", decode_wgmma}};

}  // namespace

const OpcodeFamily kWgmmaFamily = {"wgmma", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
