#include "simulator/ptx/module.h"

#include <map>
#include <mutex>

#include "simulator/core/errors.h"
#include "simulator/program/builder.h"
#include "simulator/program/globals.h"
#include "simulator/ptx/parser.h"

namespace fused_peft::sim {
namespace {

class ParsedModule final : public Module {
 public:
  explicit ParsedModule(std::string_view text) : ast_(ptx::Parser::parse(text)), globals_(*ast_) {}

  std::vector<std::string> kernels() const override {
    std::vector<std::string> names;
    for (const ptx::Function& function : ast_->functions) {
      if (function.is_entry && function.has_body) names.emplace_back(function.name);
    }
    return names;
  }

  bool has_kernel(const std::string& name) const override { return find(name) != nullptr; }

  const Program& kernel(const std::string& name) override {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<Program>& program = programs_[name];
    if (program) return *program;
    const ptx::Function* const entry = find(name);
    if (!entry) throw SyntaxError("the module has no kernel '" + name + "'");
    program = ProgramBuilder(*ast_, globals_, *entry).build();
    return *program;
  }

  std::vector<GlobalVariable> variables() const override { return globals_.variables(); }
  uint32_t target_sm() const override { return ast_->target_sm; }

 private:
  const ptx::Function* find(const std::string& name) const {
    const ptx::Function* function = globals_.function(name);
    return function && function->is_entry && function->has_body ? function : nullptr;
  }

  std::unique_ptr<ptx::Ast> ast_;
  Globals globals_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Program>> programs_;
};

}  // namespace

std::unique_ptr<Module> Module::parse(std::string_view text) {
  return std::make_unique<ParsedModule>(text);
}

}  // namespace fused_peft::sim
