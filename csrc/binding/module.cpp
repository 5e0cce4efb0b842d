// fused_peft._C: what is not a tensor op. Importing it registers the ops of lora_linear.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <string>
#include <vector>

#include "binding/cpu_isa.h"
#include "kernels/lora_linear.h"
#include "kernels/prefix_attention.h"

namespace fused_peft {
namespace {

std::atomic<cpu::Isa> current_isa{cpu::best_isa()};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::kNumIsa; ++i)
    if (cpu::isa_available(static_cast<cpu::Isa>(i)))
      names.emplace_back(cpu::isa_name(static_cast<cpu::Isa>(i)));
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < cpu::kNumIsa; ++i) {
    const auto isa = static_cast<cpu::Isa>(i);
    if (name != cpu::isa_name(isa)) continue;
    if (!cpu::isa_available(isa))
      throw pybind11::value_error("isa is '" + name + "', which this processor does not have");
    current_isa = isa;
    return;
  }
  throw pybind11::value_error("isa is '" + name +
                              "'; expected portable, avx2, avx512 or avx512_bf16");
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = FUSED_PEFT_VERSION;
  info["compiler"] = FUSED_PEFT_COMPILER;
  info["torch_built_against"] = FUSED_PEFT_TORCH_BUILT;
  info["nvcc"] = FUSED_PEFT_NVCC;
  info["cuda_architectures"] = pybind11::list();
  return info;
}

}  // namespace

cpu::Isa cpu::chosen_isa() { return current_isa; }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and CPU features of fused_peft; importing it registers its torch ops.";
  m.def("build_info", &build_info, "How this binary was built, as a dict of strings.");
  m.def("available_cpu_isas", &available_isas, "Instruction sets that this processor can run.");
  m.def("cpu_isa", [] { return std::string(cpu::isa_name(cpu::chosen_isa())); });
  m.def("set_cpu_isa", &set_isa, pybind11::arg("isa"),
        "Chooses the instruction set of the CPU kernels; ValueError where it is not available.");
  m.attr("max_rank") = cpu::kMaxRank;
  m.attr("max_head_dim") = cpu::kMaxHeadDim;
}

}  // namespace fused_peft
