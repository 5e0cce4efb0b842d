// mov: registers, constants and addresses, and packing and unpacking {a, b, ...}.
#include <iterator>

#include "simulator/core/lanes.h"
#include "simulator/core/validity.h"
#include "simulator/exec/arithmetic.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

struct Word128 {
  uint64_t low, high;
};

template <class T>
Step move(Warp& warp, const Instr& instr, LaneMask mask) {
  const T* source = lanes_of<T>(warp, instr.source(0));
  T* dest = dest_lanes<T>(warp, instr.dest(0));
  if (mask == kFullMask) {
    std::memmove(dest, source, sizeof(T) * kLanes);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      dest[lane] = (mask >> lane & 1) ? source[lane] : dest[lane];
  }
  return Step::kNext;
}

Step move_predicate(Warp& warp, const Instr& instr, LaneMask mask) {
  set_predicate(warp, instr.dest(0), mask, predicate(warp, instr.source(0)));
  return Step::kNext;
}

// {a, b, ...} -> one register; the first element lies lowest.
template <class Whole, class Part>
Step pack(Warp& warp, const Instr& instr, LaneMask mask) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  alignas(64) Part out[kLanes][kParts];
  for (int i = 0; i < kParts; ++i) {
    const Part* source = lanes_of<Part>(warp, instr.source(i));
    for (int lane = 0; lane < kLanes; ++lane) out[lane][i] = source[lane];
  }
  Whole whole[kLanes];
  std::memcpy(whole, out, sizeof whole);
  store_lanes(dest_lanes<Whole>(warp, instr.dest(0)), whole, mask);
  return Step::kNext;
}

template <class Whole, class Part>
Step unpack(Warp& warp, const Instr& instr, LaneMask mask) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  alignas(64) Part parts[kLanes][kParts];
  std::memcpy(parts, lanes_of<Whole>(warp, instr.source(0)), sizeof parts);
  for (int i = 0; i < kParts; ++i) {
    alignas(64) Part out[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = parts[lane][i];
    store_lanes(dest_lanes<Part>(warp, instr.dest(i)), out, mask);
  }
  return Step::kNext;
}

// mov.v2, .v4: element by element, as one.
template <class T>
Step move_vector(Warp& warp, const Instr& instr, LaneMask mask) {
  alignas(64) T values[4][kLanes];
  for (int i = 0; i < instr.num_dests; ++i) {
    std::memcpy(values[i], lanes_of<T>(warp, instr.source(i)), sizeof values[i]);
  }
  for (int i = 0; i < instr.num_dests; ++i) {
    store_lanes(dest_lanes<T>(warp, instr.dest(i)), values[i], mask);
  }
  return Step::kNext;
}

Type part_type(Decoding& d, Type whole, int parts) {
  switch (bytes_of(whole) / parts) {
    case 1: return Type::kB8;
    case 2: return Type::kB16;
    case 4: return Type::kB32;
    case 8: return Type::kB64;
    default: refuse_malformed(d, "the vector's elements do not add up to the type");
  }
}

// Whether the packing or unpacking of a whole of these bytes has a handler: .b8 registers are two
// bytes wide.
template <template <class, class> class Of>
Handler vector_handler(Decoding& d, Type whole, Type part) {
  switch (bytes_of(whole) * 16 + bytes_of(part)) {
    case 4 * 16 + 2: return Of<uint32_t, uint16_t>::kHandler;
    case 8 * 16 + 2: return Of<uint64_t, uint16_t>::kHandler;
    case 8 * 16 + 4: return Of<uint64_t, uint32_t>::kHandler;
    case 16 * 16 + 4: return Of<Word128, uint32_t>::kHandler;
    case 16 * 16 + 8: return Of<Word128, uint64_t>::kHandler;
    default: refuse(d, std::string("a vector of ") + name_of(part) + " in " + name_of(whole));
  }
}

template <class Whole, class Part>
struct Pack {
  static constexpr Handler kHandler = pack<Whole, Part>;
};
template <class Whole, class Part>
struct Unpack {
  static constexpr Handler kHandler = unpack<Whole, Part>;
};

void decode_unpack(Decoding& d, Type type) {
  const int parts = d.vector_length();
  const Type part = part_type(d, type, parts);
  d.open_vector();
  for (int i = 0; i < parts; ++i) d.dest(part);
  d.close_vector();
  d.source(type);
  d.handler(vector_handler<Unpack>(d, type, part), InstrClass::kMove);
}

void decode_pack(Decoding& d, Type type) {
  const int parts = d.vector_length();
  const Type part = part_type(d, type, parts);
  d.open_vector();
  for (int i = 0; i < parts; ++i) d.source(part);
  d.close_vector();
  d.handler(vector_handler<Pack>(d, type, part), InstrClass::kMove);
}

void decode_vector(Decoding& d, int count) {
  const Type type = d.need_type();
  d.open_vector();
  for (int i = 0; i < count; ++i) d.dest(type);
  d.close_vector();
  d.open_vector();
  for (int i = 0; i < count; ++i) d.source(type);
  d.close_vector();
  d.handler(with_width(d, type, []<class T>(T) -> Handler { return move_vector<T>; }),
            InstrClass::kMove);
}

void decode_mov(Decoding& d) {
  if (d.take(".v2")) return decode_vector(d, 2);
  if (d.take(".v4")) return decode_vector(d, 4);
  const Type type = d.need_type();
  if (d.next_operand() == OperandText::kVector) return decode_unpack(d, type);
  d.dest(type);
  if (d.next_operand() == OperandText::kVector) return decode_pack(d, type);
  d.source(type);
  if (type == Type::kPred) return d.handler(move_predicate, InstrClass::kMove);
  if (bytes_of(type) == 16) return d.handler(move<Word128>, InstrClass::kMove);
  d.handler(with_width(d, type, []<class T>(T) -> Handler { return move<T>; }), InstrClass::kMove);
}

constexpr Opcode kOpcodes[] = {{"mov", decode_mov}};

}  // namespace

const OpcodeFamily kMoveFamily = {"move", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
