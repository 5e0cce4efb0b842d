// How an instruction family turns its text into an Instr, and the table that finds it.
//
//   void decode_shf(Decoding& d) {                       // shf.l.wrap.b32 d, a, b, c;
//     bool left = d.take_one({".l", ".r"}) == ".l"; ...
//     d.take(".b32");
//     d.dest(Type::kB32); d.source(Type::kB32); d.source(Type::kB32); d.source(Type::kB32);
//     d.handler(left ? elementwise<...> : ..., InstrClass::kInteger);
//   }
//
// A qualifier that no decode function has taken when it returns is an Unsupported that names it,
// and so are operands left over.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "simulator/core/errors.h"
#include "simulator/core/program.h"

namespace fused_peft::sim {

// What an operand is in the text.
enum class OperandText : uint8_t {
  kRegister,
  kImmediate,
  kFloatImmediate,
  kSpecial,
  kSymbol,
  kVector,
  kAddress,
  kSink,
  kLabel,
  kNone
};

// One instruction being decoded. Operands are consumed left to right by dest(), source(), address()
// ..., each call for the next one in the text.
class Decoding {
 public:
  virtual ~Decoding() = default;

  // ---- qualifiers, in any order
  virtual std::string_view opcode() const = 0;             // "ld"
  virtual bool has(std::string_view qualifier) const = 0;  // ".global"; does not consume
  virtual bool take(std::string_view qualifier) = 0;       // consumes the first equal one
  // The first qualifier equal to one of these, consumed; "" if none.
  virtual std::string_view take_one(std::initializer_list<std::string_view> qualifiers) = 0;
  // The first type qualifier that is left, consumed; kNone if none. ".f32" ".pred" ".e4m3x2" ...
  virtual Type take_type() = 0;
  // The same where absence is an error.
  virtual Type need_type() = 0;

  // ---- operands
  virtual OperandText next_operand() const = 0;  // kind of the next; kNone at the end
  virtual int vector_length() const = 0;         // of the next operand, 1 if it is no vector
  virtual int operands_left() const = 0;
  // Bytes of one lane of the register that the next operand is; 0 for a predicate, -1 where it is
  // no register.
  virtual int next_width() const = 0;
  // The next operand as a destination register of exactly this width (or wider where `allow_wider`:
  // ld, cvt; its width is then Operand::bytes). "_" gives a sink. The registers of a vector operand
  // {a,b} by repeated calls between open_vector() and close_vector().
  virtual void dest(Type type, bool allow_wider = false) = 0;
  // The next operand as a source: register, immediate, special register or symbol's address.
  // Immediates are converted to `type` (0f3F800000 too; negative ones wrap).
  virtual void source(Type type, bool allow_wider = false) = 0;
  // The carry flag CC.CF of extended-precision arithmetic (add.cc, addc, ...): a hidden predicate
  // register of the current function, as the next destination or source.
  virtual void carry_dest() = 0;
  virtual void carry_source() = 0;
  virtual void open_vector() = 0;   // "{"
  virtual void close_vector() = 0;  // "}"
  // setp's "p|q": true if the next destination is followed by "|" and a second one.
  virtual bool has_second_predicate() const = 0;
  // The next operand "[base+offset]" : base becomes a 64-bit source (a register of 32 bits is
  // zero-extended by the handler: Operand::bytes is 4), the offset goes to Instr::imm. A symbol's
  // base is a constant.
  virtual void address() = 0;
  // TMA's "[tensorMap, {c0, c1}]": opens the bracket; then source()/open_vector() inside; then
  // close_address().
  virtual void open_address() = 0;
  virtual void close_address() = 0;
  // The next operand as an immediate integer known now.
  virtual int64_t immediate() = 0;
  virtual bool next_is_immediate() const = 0;
  // The symbol or label named by the next operand, consumed. A label becomes Instr::target and the
  // name of a .branchtargets list Instr::extra, a std::vector<uint32_t> of targets.
  virtual std::string name() = 0;
  // The state space of the symbol that is the base of the next address; kGeneric where it is a
  // register.
  virtual Space symbol_space() const = 0;

  // ---- result
  virtual void handler(Handler run, InstrClass kind, uint8_t flags = 0) = 0;
  virtual Instr& instr() = 0;                                // variant, imm, extra
  virtual void keep(std::shared_ptr<const void> extra) = 0;  // sets Instr::extra and owns it

  // Throws Unsupported / SyntaxError with the instruction's text and line.
  [[noreturn]] virtual void unsupported(const std::string& what) const = 0;
  [[noreturn]] virtual void malformed(const std::string& what) const = 0;
};

using DecodeFunction = void (*)(Decoding& decoding);

struct Opcode {
  // Up to the first dot: "add", "ld", "cp" ("cp.async" looks at its qualifiers), "mma". A call of
  // an extern function is "call:vprintf"; its operands are the return parameter, if there is one,
  // and the arguments, each an immediate(): the offset in the thread's private memory.
  const char* name;
  DecodeFunction decode;
};

// Each family's file defines one of these arrays and is listed in exec/opcode_table.cpp.
struct OpcodeFamily {
  const char* name;
  const Opcode* opcodes;
  int count;
};

// nullptr where no family knows the opcode.
DecodeFunction find_opcode(std::string_view name);

}  // namespace fused_peft::sim
