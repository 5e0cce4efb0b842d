// Deterministic fuzz test of the simulator's PTX front end: damaged PTX is refused with SyntaxError
// or Unsupported, and nothing else happens. Built with AddressSanitizer and UBSan
// (FUSED_PEFT_SANITIZE).
//
//   simulator_fuzz [--inputs N] [--seed S] [file.ptx ...]
//
// Inputs are mutations of the built-in text, of the files, and instructions put together at random
// from their words. Exit status 1 and the input in ./simulator_fuzz_failure.ptx where something
// else happened.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "simulator/core/errors.h"
#include "simulator/ptx/module.h"

namespace {

using fused_peft::sim::Module;
using Random = std::mt19937_64;

constexpr unsigned kSecondsPerInput =
    20;  // a sanitizer build on a busy machine; sound inputs take milliseconds
constexpr const char* kFailureFile = "simulator_fuzz_failure.ptx";

// A bit of everything that the parser knows.
constexpr const char* kSeed = R"(
.version 9.0
.target sm_90a, debug
.address_size 64
.extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);
.visible .global .align 8 .u64 pointers[3] = {generic(table), table+8, 0};
.global .align 4 .b8 mask[4] = {0xFF(table), 0xFF00(generic(table)+4), 3, -1};
.global .s32 table[4][2] = {{1, -2}, {3}, {(4+5)*WARP_SZ, 0x10U}};
.const .align 16 .f32 weights[2] = {0f3F800000, 1.5e-3};
.global .v4 .f32 vectors[1];
.extern .shared .align 128 .b8 dynamic[];
.shared .attribute(.unified(1, 2)) .b32 fixed[16];
.weak .func (.param .align 16 .b8 result[32]) twice(.param .align 16 .b8 x[32], .reg .u32 n)
{
  .reg .b64 %rd<9>;
  .local .align 8 .b8 depot[64];
  mov.u64 %rd1, depot;
  cvta.local.u64 %rd2, %rd1;
  ld.param.v2.b64 {%rd3, %rd4}, [x+16];
  add.cc.u64 %rd5, %rd3, %rd4;
  addc.u64 %rd6, %rd5, 0;
  st.param.v2.b64 [result+0], {%rd5, %rd6};
  ret;
}
.visible .entry kernel(.param .u64 .ptr .global .align 16 out, .param .align 8 .b8 big[24])
.maxntid 128, 1, 1
.minnctapersm 2
.reqnctapercluster 2, 1, 1
{
  .reg .pred %p<9>;
  .reg.b16 %rs<9>;
  .reg .b32 %r<30>;
  .reg .b64 %rd<30>;
  .reg .f32 %f<9>;
  .reg .f64 %d<4>;
  .reg .v4 .f32 %v;
  .reg .b128 %q;
  .loc 1 10 3
  ld.param.u64 %rd1, [out];
  cvta.to.global.u64 %rd2, %rd1;
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, fixed;
  mad.lo.s32 %r3, %r1, 4, %r2;
  setp.lt.and.s32 %p1|%p2, %r1, -5, !%p3;
@%p1 bra $BEHIND;
  .loc 2 20 1, function_name $L__info_string0+4, inlined_at 1 11 5
  ld.global.nc.v4.f32 {%f1, %f2, _, %f4}, [%rd2+-16];
  fma.rn.ftz.f32 %f5, %f1, %f2, 0f3F000000;
  @!%p2 st.shared.f32 [%r3], %f5;
  { .reg .pred P1; LAB_WAIT: setp.ne.u32 P1, %r1, 0; @P1 bra DONE; bra LAB_WAIT; DONE: }
  { .reg .pred P1; LAB_WAIT: setp.ne.u32 P1, %r1, 1; @P1 bra DONE; bra LAB_WAIT; DONE: }
  bar.sync 0;
  shfl.sync.bfly.b32 %r4|%p4, %r1, 1, 0x1f, -1;
  atom.global.add.u32 %r5, [%rd2], 1;
  mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
  cp.async.cg.shared.global.L2::128B [%r3], [%rd2], 16;
  mov.b64 %rd5, {%r1, %r2};
  cvt.rn.bf16x2.f32 %r7, %f1, %f2;
  selp.b32 %r8, 1, 0, %p1;
  lop3.b32 %r9, %r1, %r2, %r3, 0x96;
  mov.u64 %rd9, big;
  {
    .param .align 16 .b8 p0[32];
    .param .align 16 .b8 r0[32];
    st.param.b64 [p0+0], %rd1;
    st.param.b64 [p0+16], %rd2;
    call.uni (r0), twice, (p0, 7);
    ld.param.b64 %rd7, [r0+8];
  }
  brx.idx %r1, targets;
  targets: .branchtargets $BEHIND, $END;
$BEHIND:
  .pragma "nounroll";
  st.global.u64 [%rd2+8], %rd7;
$END:
  ret;
}
.file 1 "kernel.cu"
.file 2 "header.cuh"
.section .debug_str
{
$L__info_string0:
.b8 95,90,0
}
)";

std::string g_input;

void write_failure() {
  std::ofstream(kFailureFile) << g_input;
  std::fprintf(stderr, "the input is in %s\n", kFailureFile);
}

void on_alarm(int) {
  static constexpr char kText[] = "simulator_fuzz: an input takes too long\n";
  if (write(2, kText, sizeof kText - 1) < 0) _exit(2);
  write_failure();
  _exit(1);
}

std::size_t below(Random& random, std::size_t limit) { return limit ? random() % limit : 0; }

// Words, numbers, blanks and signs of a text, so that a mutation keeps its shape.
std::vector<std::string> split(const std::string& text) {
  const auto kind = [](char c) {
    if (std::isalnum(uint8_t(c)) || c == '_' || c == '%' || c == '$' || c == '.') return 0;
    return std::isspace(uint8_t(c)) ? 1 : 2;
  };
  std::vector<std::string> words;
  for (char c : text) {
    const bool same = !words.empty() && kind(words.back().back()) == kind(c) && kind(c) != 2;
    if (!same || c == '.') words.emplace_back();
    words.back() += c;
  }
  return words;
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += word;
  return text;
}

const char* odd_word(Random& random) {
  static constexpr const char* kWords[] = {"0",
                                           "-1",
                                           "4294967295",
                                           "18446744073709551615",
                                           "9223372036854775808",
                                           "0x7fffffffffffffff",
                                           "1000000000",
                                           "00",
                                           "0f",
                                           "0f7FFFFFFF",
                                           "0dFFF0000000000000",
                                           "1e999",
                                           "%",
                                           "%r",
                                           "%r0",
                                           "%p0",
                                           "%tid.x",
                                           "%tid",
                                           "%clock64",
                                           "_",
                                           "{",
                                           "}",
                                           "(",
                                           ")",
                                           "[",
                                           "]",
                                           ";",
                                           ",",
                                           ":",
                                           "|",
                                           "!",
                                           "@",
                                           "+",
                                           "-",
                                           "<",
                                           ">",
                                           "=",
                                           "\"",
                                           "/*",
                                           "//",
                                           ".reg",
                                           ".param",
                                           ".b8",
                                           ".b128",
                                           ".pred",
                                           ".v2",
                                           ".v4",
                                           ".align",
                                           ".entry",
                                           ".func",
                                           ".section",
                                           ".loc",
                                           "ret",
                                           "call",
                                           "bra",
                                           "WARP_SZ",
                                           "generic",
                                           "\0x",
                                           "\xff"};
  return kWords[below(random, std::size(kWords))];
}

void mutate_words(std::vector<std::string>& words, const std::vector<std::string>& others,
                  Random& random) {
  if (words.empty()) return;
  const std::size_t at = below(random, words.size());
  switch (below(random, 7)) {
    case 0: words.erase(words.begin() + std::ptrdiff_t(at)); break;
    case 1: words[at] = odd_word(random); break;
    case 2: words.insert(words.begin() + std::ptrdiff_t(at), odd_word(random)); break;
    case 3: std::swap(words[at], words[below(random, words.size())]); break;
    case 4: words[at] = others[below(random, others.size())]; break;
    case 5: {  // a stretch twice
      const std::size_t count = std::min(words.size() - at, 1 + below(random, 60));
      const std::vector<std::string> stretch(words.begin() + std::ptrdiff_t(at),
                                             words.begin() + std::ptrdiff_t(at + count));
      words.insert(words.begin() + std::ptrdiff_t(below(random, words.size())), stretch.begin(),
                   stretch.end());
      break;
    }
    default: {  // a stretch away
      const std::size_t count = std::min(words.size() - at, 1 + below(random, 40));
      words.erase(words.begin() + std::ptrdiff_t(at), words.begin() + std::ptrdiff_t(at + count));
    }
  }
}

void mutate_bytes(std::string& text, Random& random) {
  if (text.empty()) return;
  const std::size_t at = below(random, text.size());
  switch (below(random, 4)) {
    case 0: text[at] = char(random()); break;
    case 1: text.erase(at, 1 + below(random, 3)); break;
    case 2: text.insert(at, 1 + below(random, 3), char(32 + below(random, 95))); break;
    default: text.resize(at);
  }
}

// A kernel of instructions made from the qualifiers and operands of others.
std::string assemble(const std::vector<std::string>& words, Random& random) {
  std::string text =
      ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 out)\n{\n.reg "
      ".pred %p<9>;.reg .b16 "
      "%rs<9>;.reg .b32 %r<30>;.reg .b64 %rd<30>;.reg .f32 %f<9>;.reg .f64 %d<4>;\n";
  const auto word = [&](char first) {
    for (int tries = 0; tries < 200; ++tries) {
      const std::string& candidate = words[below(random, words.size())];
      if (first == 'a' ? std::islower(uint8_t(candidate[0])) != 0 : candidate[0] == first)
        return candidate;
    }
    return std::string("add");
  };
  for (std::size_t i = 0, count = 1 + below(random, 4); i < count; ++i) {
    text += word('a');
    for (std::size_t q = below(random, 5); q > 0; --q) text += word('.');
    const std::size_t operands = below(random, 6);
    for (std::size_t o = 0; o < operands; ++o) {
      text += o ? ", " : " ";
      switch (below(random, 8)) {
        case 0: text += "[" + word('%') + "+" + std::to_string(below(random, 64)) + "]"; break;
        case 1: text += "{" + word('%') + "," + word('%') + "}"; break;
        case 2: text += std::to_string(int64_t(random()) >> below(random, 64)); break;
        case 3: text += "0f3F800000"; break;
        case 4: text += word('%') + "|" + word('%'); break;
        default: text += word('%');
      }
    }
    text += ";\n";
  }
  return text + "}\n";
}

// False where anything but a clean refusal or a clean success came of it.
bool survives(const std::string& text) {
  g_input = text;
  alarm(kSecondsPerInput);
  try {
    const auto module = Module::parse(text);
    for (const std::string& kernel : module->kernels()) {
      try {
        module->kernel(kernel);
      } catch (const fused_peft::sim::SyntaxError&) {
      } catch (const fused_peft::sim::Unsupported&) {
      }
    }
  } catch (const fused_peft::sim::SyntaxError&) {
  } catch (const fused_peft::sim::Unsupported&) {
  } catch (const std::exception& error) {
    std::fprintf(stderr, "an exception of another kind: %s\n", error.what());
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> seeds{kSeed};
  unsigned long inputs = 3000, seed = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if ((argument == "--inputs" || argument == "--seed") && i + 1 < argc) {
      (argument == "--seed" ? seed : inputs) = std::strtoul(argv[++i], nullptr, 10);
      continue;
    }
    std::ifstream file(argument);
    if (!file) {
      std::fprintf(stderr, "cannot read %s\n", argv[i]);
      return 2;
    }
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  signal(SIGALRM, on_alarm);
  // The seeds themselves are sound: a front end that refuses everything would pass otherwise.
  for (const std::string& text : seeds) {
    try {
      const auto module = Module::parse(text);
      if (module->kernels().empty()) throw std::runtime_error("it has no kernel");
      for (const std::string& kernel : module->kernels()) module->kernel(kernel);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "a seed is refused: %s\n", error.what());
      return 1;
    }
  }
  std::vector<std::vector<std::string>> split_seeds;
  for (const std::string& text : seeds) split_seeds.push_back(split(text));
  Random random(seed);
  for (unsigned long i = 0; i < inputs; ++i) {
    const std::size_t which = below(random, seeds.size());
    std::string text;
    if (below(random, 4) == 0) {
      text = assemble(split_seeds[which], random);
    } else {
      std::vector<std::string> words = split_seeds[which];
      const std::vector<std::string>& others = split_seeds[below(random, seeds.size())];
      for (std::size_t n = below(random, 6); n > 0; --n) mutate_words(words, others, random);
      text = join(words);
      for (std::size_t n = below(random, 3); n > 0; --n) mutate_bytes(text, random);
    }
    if (!survives(text)) {
      write_failure();
      return 1;
    }
  }
  alarm(0);
  std::printf("%lu inputs from %zu texts: no failure\n", inputs, seeds.size());
  return 0;
}
