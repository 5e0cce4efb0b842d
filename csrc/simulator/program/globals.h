// The module's own variables and functions: what a name means at module scope.
#pragma once

#include <cstddef>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "simulator/core/program.h"
#include "simulator/ptx/ast.h"

namespace fused_peft::sim {

// Memory of the .global and .const variables, initialised, and known to memcheck while the object
// lives.
class Globals {
 public:
  explicit Globals(const ptx::Ast& ast);
  ~Globals();
  Globals(const Globals&) = delete;
  Globals& operator=(const Globals&) = delete;

  const ptx::Variable* variable(std::string_view name) const;
  // Where a .global or .const variable lies; nullptr for .shared, and for one that is declared
  // .extern only.
  std::byte* address(const ptx::Variable& variable) const;
  // The definition where there is one, else the declaration; aliases followed. nullptr where there
  // is none.
  const ptx::Function* function(std::string_view name) const;
  // What taking a function's address gives: unique, and no memory.
  static uint64_t function_address(const ptx::Function& function) {
    return reinterpret_cast<uint64_t>(&function);
  }

  const std::vector<GlobalVariable>& variables() const { return listed_; }

 private:
  void declare();
  void collect();
  void allocate();
  void initialise(const ptx::Variable& variable) const;
  uint64_t value_of(const ptx::Variable& variable, const ptx::InitialValue& value) const;
  uint64_t address_of(const ptx::InitialValue& value) const;

  // Zero pages, taken from the system when first touched.
  struct Pages {
    std::byte* start = nullptr;
    std::size_t bytes = 0;
    ~Pages();
  };
  const ptx::Ast& ast_;
  Pages memory_;
  std::unordered_map<std::string_view, const ptx::Variable*> variables_;
  std::unordered_map<std::string_view, const ptx::Function*> functions_;
  std::unordered_map<const ptx::Variable*, std::byte*> addresses_;
  std::vector<const ptx::Variable*>
      owned_;                           // with memory of their own, those of function bodies too
  std::vector<GlobalVariable> listed_;  // those that the host can name
};

}  // namespace fused_peft::sim
