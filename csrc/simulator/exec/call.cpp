// Functions of the device runtime that PTX declares extern: vprintf, __assertfail, malloc, free.
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "simulator/check/checker.h"
#include "simulator/exec/families.h"

namespace fused_peft::sim {
namespace {

constexpr int kErrorAssert = 710;

// Where the parameters of the call lie in the calling thread's private memory: the result first, if
// there is one.
using CallOffsets = std::vector<uint32_t>;

template <class T>
T argument(const Warp& warp, const Instr& instr, int lane, int i) {
  const auto& offsets = *static_cast<const CallOffsets*>(instr.extra);
  T value;
  std::memcpy(&value,
              warp.private_memory + size_t(lane) * warp.program->private_bytes + offsets[size_t(i)],
              sizeof value);
  return value;
}

template <class T>
void set_result(Warp& warp, const Instr& instr, int lane, T value) {
  const auto& offsets = *static_cast<const CallOffsets*>(instr.extra);
  std::memcpy(warp.private_memory + size_t(lane) * warp.program->private_bytes + offsets[0], &value,
              sizeof value);
}

// The result of these lanes has been set: it is initialised now.
template <class T>
void mark_result(Warp& warp, const Instr& instr, LaneMask lanes) {
  std::array<uint64_t, kLanes> address;
  address.fill(kCalleeParam + (*static_cast<const CallOffsets*>(instr.extra))[0]);
  const Access access{.space = Space::kParam,
                      .kind = AccessKind::kWrite,
                      .bytes = sizeof(T),
                      .lanes = lanes,
                      .address = address.data()};
  warp.cta->launch->checker->access(warp, instr, access, lanes, nullptr);
}

// The memory behind a generic address, up to the end of the variable or buffer it lies in.
std::span<const std::byte> memory_at(const Warp& warp, int lane, uint64_t address) {
  if (address >= kLocalWindow && address < kLocalWindow + warp.program->local_bytes) {
    const uint64_t offset = address - kLocalWindow;
    return {warp.local + size_t(lane) * warp.program->local_bytes + offset,
            warp.program->local_bytes - offset};
  }
  if (address >= kSharedWindow) return {};
  const auto* pointer = reinterpret_cast<const std::byte*>(address);
  const std::span<std::byte> buffer = MemoryMap::global().find(pointer);
  if (buffer.empty()) return {};
  return {pointer, size_t(buffer.data() + buffer.size() - pointer)};
}

// A zero-terminated string; "<bad address>" where there is none.
std::string string_at(const Warp& warp, int lane, uint64_t address) {
  const std::span<const std::byte> memory = memory_at(warp, lane, address);
  const void* end = memory.empty() ? nullptr : std::memchr(memory.data(), 0, memory.size());
  if (!end) return "<bad address>";
  return {reinterpret_cast<const char*>(memory.data()), static_cast<const char*>(end)};
}

// The variable arguments, as nvcc lays them out: one after another, each naturally aligned.
class VariableArguments {
 public:
  VariableArguments(const Warp& warp, int lane, uint64_t address)
      : memory_(memory_at(warp, lane, address)) {}

  template <class T>
  T take() {
    at_ = (at_ + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    T value{};
    if (at_ + sizeof(T) <= memory_.size()) std::memcpy(&value, memory_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

 private:
  std::span<const std::byte> memory_;
  size_t at_ = 0;
};

template <class T>
std::string formatted(const std::string& spec, T value) {
  const int length = std::snprintf(nullptr, 0, spec.c_str(), value);
  if (length < 0) return spec;
  std::string text(size_t(length) + 1, '\0');
  std::snprintf(text.data(), text.size(), spec.c_str(), value);
  text.pop_back();
  return text;
}

// One conversion: "%", flags, width and precision, then size and type, which decide what is taken.
std::string convert(const Warp& warp, int lane, const std::string& flags, const std::string& size,
                    char type, VariableArguments& arguments) {
  const bool wide = size == "l" || size == "ll";
  switch (type) {
    case 'd':
    case 'i':
      return wide ? formatted(flags + "lld", arguments.take<long long>())
                  : formatted(flags + size + type, arguments.take<int>());
    case 'o':
    case 'u':
    case 'x':
    case 'X':
      return wide ? formatted(flags + "ll" + type, arguments.take<unsigned long long>())
                  : formatted(flags + size + type, arguments.take<unsigned>());
    case 'c': return formatted(flags + "c", arguments.take<int>());
    case 'p': return formatted(flags + "p", reinterpret_cast<void*>(arguments.take<uint64_t>()));
    case 's':
      return formatted(flags + "s", string_at(warp, lane, arguments.take<uint64_t>()).c_str());
    case 'a':
    case 'A':
    case 'e':
    case 'E':
    case 'f':
    case 'F':
    case 'g':
    case 'G': return formatted(flags + type, arguments.take<double>());
    default: return flags + size + type;
  }
}

// *conversions: how many there were.
std::string format(const Warp& warp, int lane, const std::string& text, uint64_t address,
                   int* conversions) {
  VariableArguments arguments(warp, lane, address);
  std::string out;
  for (size_t i = 0; i < text.size();) {
    if (text[i] != '%') {
      out += text[i++];
      continue;
    }
    const size_t flags_end =
        std::min(text.find_first_not_of("-+ #0123456789.", i + 1), text.size());
    const size_t size_end = std::min(text.find_first_not_of("hl", flags_end), text.size());
    if (size_end == text.size()) return out + text.substr(i);
    if (text[size_end] == '%') {
      out += '%';
    } else {
      out += convert(warp, lane, text.substr(i, flags_end - i),
                     text.substr(flags_end, size_end - flags_end), text[size_end], arguments);
      ++*conversions;
    }
    i = size_end + 1;
  }
  return out;
}

Step run_vprintf(Warp& warp, const Instr& instr, LaneMask mask) {
  Launch& launch = *warp.cta->launch;
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const std::string text = string_at(warp, lane, argument<uint64_t>(warp, instr, lane, 1));
    int conversions = 0;
    const std::string line =
        format(warp, lane, text, argument<uint64_t>(warp, instr, lane, 2), &conversions);
    set_result<int>(warp, instr, lane, conversions);
    const std::scoped_lock lock(launch.mutex);
    launch.output += line;
  }
  mark_result<int>(warp, instr, mask);
  return Step::kNext;
}

Step run_assertfail(Warp& warp, const Instr& instr, LaneMask mask) {
  const int lane = std::countr_zero(mask);
  const auto text = [&](int i) {
    return string_at(warp, lane, argument<uint64_t>(warp, instr, lane, i));
  };
  throw LaunchFailure(kErrorAssert, text(1) + ":" +
                                        std::to_string(argument<uint32_t>(warp, instr, lane, 2)) +
                                        ": " + text(3) + ": assertion `" + text(0) +
                                        "` failed: " + describe(warp, instr, mask));
}

// Memory of device-side malloc lives until free, across launches, as the device heap's does.
Step run_malloc(Warp& warp, const Instr& instr, LaneMask mask) {
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const uint64_t bytes = argument<uint64_t>(warp, instr, lane, 1);
    void* memory = bytes == 0 ? nullptr : std::aligned_alloc(16, (bytes + 15) / 16 * 16);
    if (memory) MemoryMap::global().add(memory, bytes, /*initialised=*/false, "device malloc");
    set_result<uint64_t>(warp, instr, lane, reinterpret_cast<uint64_t>(memory));
  }
  mark_result<uint64_t>(warp, instr, mask);
  return Step::kNext;
}

Step run_free(Warp& warp, const Instr& instr, LaneMask mask) {
  for (LaneMask left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const uint64_t address = argument<uint64_t>(warp, instr, lane, 0);
    void* memory = reinterpret_cast<void*>(address);
    if (!memory) continue;
    if (MemoryMap::global().remove(memory)) {
      std::free(memory);
    } else {
      warp.cta->launch->checker->report(warp, instr, LaneMask{1} << lane, FindingKind::kOther,
                                        "free of an address that malloc has not returned");
    }
  }
  return Step::kNext;
}

void decode_call(Decoding& d, int results, int arguments, Handler run) {
  if (d.operands_left() != results + arguments) {
    d.unsupported("a call with " + std::to_string(d.operands_left()) + " parameters, not " +
                  std::to_string(results + arguments));
  }
  auto offsets = std::make_shared<CallOffsets>();
  while (d.operands_left() > 0) offsets->push_back(uint32_t(d.immediate()));
  d.keep(std::move(offsets));
  d.handler(run, InstrClass::kOther);
}

constexpr Opcode kOpcodes[] = {
    {"call:vprintf", [](Decoding& d) { decode_call(d, 1, 2, run_vprintf); }},
    {"call:__assertfail", [](Decoding& d) { decode_call(d, 0, 5, run_assertfail); }},
    {"call:malloc", [](Decoding& d) { decode_call(d, 1, 1, run_malloc); }},
    {"call:free", [](Decoding& d) { decode_call(d, 0, 1, run_free); }},
};

}  // namespace

const OpcodeFamily kCallFamily{"call", kOpcodes, std::size(kOpcodes)};

}  // namespace fused_peft::sim
