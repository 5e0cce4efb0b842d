// mma.sync of 16-, 8- and 4-bit elements and TF32.
//
// Sums are in single precision and in order of k, each step rounded once; the tensor core's own
// order and truncation are not modelled. Of integers, and wherever sums are exact, there is no
// difference.
#include "simulator/exec/mma.h"

#include <cstdio>
#include <iterator>

#include "simulator/check/checker.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"
#include "simulator/exec/mma_accumulators.h"
#include "simulator/exec/mma_elements.h"
#include "simulator/exec/mma_fragments.h"
#include "simulator/exec/mma_multiply.h"

namespace fused_peft::sim {
namespace {

// A register of B, the columns of one chunk, as rows of 8 columns.
template <class B>
void load_rows(const uint32_t* columns, __m256* rows) {
  constexpr int kWidth = 4 * B::kPerRegister;
  if constexpr (requires { B::widen; }) {
    alignas(16) __m128i from[8], halves[8];
    std::memcpy(from, columns, sizeof from);
    transpose_halves(from, halves);
    for (int j = 0; j < kWidth; ++j) rows[j] = B::widen(halves[j]);
  } else {
    alignas(64) float values[kLanes * B::kPerRegister];
    B::load(columns, values, kLanes);
    to_rows<1, kWidth>(values, rows);
  }
}

template <int kRows, int kChunks, class A, class B, class Accumulator>
Step mma(Warp& warp, const Instr& instr, LaneMask mask) {
  static_assert(A::kPerRegister == B::kPerRegister);
  constexpr int kWidth = 4 * A::kPerRegister, kValues = kLanes * A::kPerRegister;
  constexpr MmaOperands kOperands{kChunks * kRows / 8, kChunks, Accumulator::kRegisters};
  if (mask != kFullMask && waits_for_lanes(warp, instr, mask)) [[unlikely]]
    return Step::kBlock;
  alignas(64) float a[kOperands.num_a * kValues], d[kRows * 8];
  __m256 b[kChunks * kWidth];
  for (int i = 0; i < kOperands.num_a; ++i) {
    A::load(lanes_of<uint32_t>(warp, kOperands.a(instr, i)), a + i * kValues, kLanes);
  }
  for (int i = 0; i < kChunks; ++i)
    load_rows<B>(lanes_of<uint32_t>(warp, kOperands.b(instr, i)), b + i * kWidth);
  const Operand* c = &kOperands.c(instr, 0);
  Accumulator::load(warp, c, d);
  accumulate<kRows, kChunks, kWidth>(a, b, d);
  propagate_mma_validity(warp, instr, mask, kOperands, kRows, Accumulator::kPairs);
  Accumulator::store(warp, &instr.dest(0), c, mask, d);
  return Step::kNext;
}

// ---- decode

template <int kRows, class A, class B, class Accumulator>
Handler of_chunks(int chunks) {
  return chunks == 1 ? mma<kRows, 1, A, B, Accumulator> : mma<kRows, 2, A, B, Accumulator>;
}

template <class A, class B>
Handler float_handler(Decoding& d, const MmaForm& form, Type accumulator, int chunks) {
  if (form.m != 16) refuse(d, "this shape");
  if (accumulator == Type::kF32) return of_chunks<16, A, B, F32Accumulator<16>>(chunks);
  return of_chunks<16, A, B, F16Accumulator<16>>(chunks);
}

template <class A, class B>
Handler integer_handler(const MmaForm& form, int chunks) {
  if (form.m == 8) {
    return form.satfinite ? mma<8, 1, A, B, S32Accumulator<8, true>>
                          : mma<8, 1, A, B, S32Accumulator<8, false>>;
  }
  return form.satfinite ? of_chunks<16, A, B, S32Accumulator<16, true>>(chunks)
                        : of_chunks<16, A, B, S32Accumulator<16, false>>(chunks);
}

// fn(A(), B()) of two types that may differ.
template <class First, class Second, class Fn>
Handler with_pair(bool a_second, bool b_second, Fn fn) {
  if (a_second) return b_second ? fn(Second{}, Second{}) : fn(Second{}, First{});
  return b_second ? fn(First{}, Second{}) : fn(First{}, First{});
}

struct MmaTypes {
  std::string_view a, b;
  Type accumulator = Type::kNone;
};

int bits_of_element(std::string_view name) {
  if (name == ".f16" || name == ".bf16") return 16;
  if (name == ".tf32") return 32;
  return name == ".s4" || name == ".u4" ? 4 : 8;
}

bool is_one_of(std::string_view name, std::initializer_list<std::string_view> names) {
  for (std::string_view candidate : names) {
    if (name == candidate) return true;
  }
  return false;
}

Handler choose_handler(Decoding& d, const MmaForm& form, const MmaTypes& types, int chunks) {
  const auto floats = [&]<class A, class B>(A, B) {
    return float_handler<A, B>(d, form, types.accumulator, chunks);
  };
  const auto integers = [&]<class A, class B>(A, B) { return integer_handler<A, B>(form, chunks); };
  if (is_one_of(types.a, {".s8", ".u8"})) {
    return with_pair<S8Elements, U8Elements>(types.a == ".u8", types.b == ".u8", integers);
  }
  if (is_one_of(types.a, {".s4", ".u4"})) {
    return with_pair<S4Elements, U4Elements>(types.a == ".u4", types.b == ".u4", integers);
  }
  if (is_one_of(types.a, {".e4m3", ".e5m2"})) {
    return with_pair<E4M3Elements, E5M2Elements>(types.a == ".e5m2", types.b == ".e5m2", floats);
  }
  if (types.a == ".f16") return floats(F16Elements{}, F16Elements{});
  return types.a == ".bf16" ? floats(BF16Elements{}, BF16Elements{})
                            : floats(TF32Elements{}, TF32Elements{});
}

// dtype.atype.btype.ctype
MmaTypes take_types(Decoding& d) {
  MmaTypes types;
  types.accumulator = d.need_type();
  const auto take = [&d] {
    return d.take_one({".f16", ".bf16", ".tf32", ".e4m3", ".e5m2", ".s8", ".u8", ".s4", ".u4"});
  };
  types.a = take();
  types.b = take();
  if (types.a.empty() || types.b.empty()) refuse(d, "the types of A and B");
  if (d.need_type() != types.accumulator) refuse(d, "C of another type than D");
  const bool same_kind =
      (is_one_of(types.a, {".s8", ".u8"}) && is_one_of(types.b, {".s8", ".u8"})) ||
      (is_one_of(types.a, {".s4", ".u4"}) && is_one_of(types.b, {".s4", ".u4"})) ||
      (is_one_of(types.a, {".e4m3", ".e5m2"}) && is_one_of(types.b, {".e4m3", ".e5m2"})) ||
      types.a == types.b;
  if (!same_kind) refuse_malformed(d, "A and B of types that do not go together");
  const bool integer = types.a[1] == 's' || types.a[1] == 'u';
  const bool half_sums = is_one_of(types.a, {".f16", ".e4m3", ".e5m2"});
  const Type sum = types.accumulator;
  if (!(integer ? sum == Type::kS32 : sum == Type::kF32 || (half_sums && sum == Type::kF16))) {
    refuse_malformed(d, "D of a type that A and B have not");
  }
  return types;
}

MmaForm take_shape(Decoding& d) {
  static constexpr struct {
    const char* name;
    int m, k;
  } kShapes[] = {{".m8n8k4", 8, 4},       {".m8n8k16", 8, 16},    {".m8n8k32", 8, 32},
                 {".m8n8k128", 8, 128},   {".m16n8k4", 16, 4},    {".m16n8k8", 16, 8},
                 {".m16n8k16", 16, 16},   {".m16n8k32", 16, 32},  {".m16n8k64", 16, 64},
                 {".m16n8k128", 16, 128}, {".m16n8k256", 16, 256}};
  for (const auto& shape : kShapes) {
    if (d.take(shape.name)) return {shape.m, 8, shape.k, false};
  }
  refuse_malformed(d, "a shape is missing");
}

void decode_mma(Decoding& d) {
  if (d.has(".sp") || d.has(".sp::ordered_metadata")) refuse(d, "sparse mma");
  d.take(".sync");
  d.take(".aligned");
  MmaForm form = take_shape(d);
  if (!d.take(".row") || !d.take(".col")) refuse(d, "layouts other than .row.col");
  form.satfinite = d.take(".satfinite");
  if (d.has(".f64")) return decode_mma_f64(d, form);
  if (d.has(".b1")) return decode_mma_b1(d, form);
  const MmaTypes types = take_types(d);
  if (form.satfinite && types.accumulator != Type::kS32)
    refuse_malformed(d, ".satfinite is for integers");
  // k of one register of each of the four lanes of a group.
  const int width = 4 * 32 / bits_of_element(types.a), chunks = form.k / width;
  const bool shape_exists = form.k % width == 0 && chunks >= 1 && chunks <= (form.m == 8 ? 1 : 2) &&
                            (form.m == 16 || types.accumulator == Type::kS32);
  if (!shape_exists) refuse(d, "this shape of these types");
  const int num_d = form.m / (types.accumulator == Type::kF16 ? 8 : 4);
  const Type type_d = types.accumulator == Type::kF16 ? Type::kB32 : types.accumulator;
  take_mma_operands(d, type_d, num_d, Type::kB32, chunks * form.m / 8, chunks);
  d.handler(choose_handler(d, form, types, chunks), InstrClass::kTensor, kOwnValidity);
}

constexpr Opcode kOpcodes[] = {{"mma", decode_mma}};

void take_vector(Decoding& d, Type type, int count, bool dest) {
  // A fragment of one register may be written without braces.
  const bool vector = d.next_operand() == OperandText::kVector;
  if (d.vector_length() != count) {
    refuse_malformed(d, "a fragment of " + std::to_string(count) + " registers is expected");
  }
  if (vector) d.open_vector();
  for (int i = 0; i < count; ++i) dest ? d.dest(type) : d.source(type);
  if (vector) d.close_vector();
}

}  // namespace

const OpcodeFamily kMmaFamily = {"mma", kOpcodes, std::size(kOpcodes)};

void take_mma_operands(Decoding& d, Type type_d, int num_d, Type type_ab, int num_a, int num_b) {
  take_vector(d, type_d, num_d, true);
  take_vector(d, type_ab, num_a, false);
  take_vector(d, type_ab, num_b, false);
  take_vector(d, type_d, num_d, false);
}

bool waits_for_lanes(Warp& warp, const Instr& instr, LaneMask mask) {
  if (mask == kFullMask) return false;
  if (mask != warp.alive() && !warp.stuck) {
    warp.current.wait = Wait::kConverge;
    warp.current.waits_for = "the other lanes of its warp";
    return true;
  }
  char text[96];
  std::snprintf(text, sizeof text, "all lanes of the warp must execute it, these do not: %08x",
                ~mask);
  warp.cta->launch->checker->report(warp, instr, mask, FindingKind::kOther, text);
  return false;
}

}  // namespace fused_peft::sim
