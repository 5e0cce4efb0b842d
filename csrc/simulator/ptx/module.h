// PTX text -> kernels.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "simulator/core/program.h"

namespace fused_peft::sim {

class Module {
 public:
  // Parses all of the text and allocates its global and constant variables (initialised as the text
  // says, zero elsewhere). Throws SyntaxError with the PTX line.
  static std::unique_ptr<Module> parse(std::string_view text);
  virtual ~Module() = default;

  // Names of the .entry functions, mangled.
  virtual std::vector<std::string> kernels() const = 0;
  virtual bool has_kernel(const std::string& name) const = 0;
  // Decodes the kernel at the first call (device functions inlined) and keeps it. Throws
  // Unsupported.
  virtual const Program& kernel(const std::string& name) = 0;
  virtual std::vector<GlobalVariable> variables() const = 0;
  virtual uint32_t target_sm() const = 0;
};

}  // namespace fused_peft::sim
