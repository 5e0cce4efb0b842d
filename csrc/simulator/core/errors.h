// What stops a module from loading or a launch from going on.
#pragma once

#include <stdexcept>
#include <string>

namespace fused_peft::sim {

// The text is not PTX as the ISA has it.
struct SyntaxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// PTX that the simulator does not implement: an instruction, a qualifier, a runtime call. what()
// names it and the source line. Nothing is ever skipped in silence.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The kernel cannot go on: trap, assert, deadlock, instruction budget. error_code is a cudaError_t.
struct LaunchFailure : std::runtime_error {
  LaunchFailure(int error_code, const std::string& what)
      : std::runtime_error(what), error_code(error_code) {}
  int error_code;
};

}  // namespace fused_peft::sim
