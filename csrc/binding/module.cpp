// fused_peft._C: what is not a tensor op. Importing it registers the ops of lora_linear.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <sstream>
#include <string>
#include <vector>

#include "binding/cpu_isa.h"
#include "kernels/cuda/lora_linear_config.h"
#include "kernels/cuda/prefix_attention_config.h"
#include "kernels/lora_linear.h"
#include "kernels/prefix_attention.h"

namespace fused_peft {
namespace {

using pybind11::arg;

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
  pybind11::list architectures;
  std::istringstream list(FUSED_PEFT_CUDA_ARCHITECTURES);
  for (std::string architecture; std::getline(list, architecture, ',');)
    architectures.append(architecture);
  return pybind11::dict(arg("version") = FUSED_PEFT_VERSION, arg("compiler") = FUSED_PEFT_COMPILER,
                        arg("torch_built_against") = FUSED_PEFT_TORCH_BUILT,
                        arg("nvcc") = FUSED_PEFT_NVCC, arg("cuda_architectures") = architectures);
}

const char* name_of(cuda::ForwardPath path) {
  switch (path) {
    case cuda::ForwardPath::kDecode: return "decode";
    case cuda::ForwardPath::kFusedDown: return "fused down projection";
    case cuda::ForwardPath::kSingleLaunch: return "single launch";
    case cuda::ForwardPath::kTwoLaunches: break;
  }
  return "down projection, then GEMM";
}

const char* name_of(cuda::BackwardPath path) {
  return path == cuda::BackwardPath::kSingleLaunch ? "GEMM with the dy pass, then x pass"
                                                   : "dy pass, x pass, GEMM";
}

const char* name_of(cuda::GemmKernel kernel) {
  switch (kernel) {
    case cuda::GemmKernel::kPingpong: return "sm_90a pingpong";
    case cuda::GemmKernel::kCooperative: return "sm_90a cooperative";
    case cuda::GemmKernel::kSm80: break;
  }
  return "sm_80";
}

pybind11::dict dict_of(const cuda::SkinnyChoice& choice) {
  return pybind11::dict(arg("rank") = choice.rank, arg("row_blocks") = choice.row_blocks,
                        arg("ctas") = choice.ctas, arg("rank_blocks") = choice.rank_blocks,
                        arg("cluster") = choice.cluster);
}

pybind11::dict dict_of(const cuda::GemmChoice& choice) {
  return pybind11::dict(arg("kernel") = name_of(choice.kernel), arg("block_m") = choice.block_m,
                        arg("block_n") = choice.block_n, arg("tiles") = choice.tiles,
                        arg("cluster") = choice.cluster, arg("ctas") = choice.ctas,
                        arg("raster_rows") = choice.raster_rows);
}

// The kernels that a LoRA layer would get on a device of these facts; a pure function.
pybind11::dict lora_linear_plan(int64_t m, int64_t n, int64_t k, int64_t r, bool factor_float,
                                bool dropout, bool weight_k_major, bool aligned, int num_sms,
                                int shared_per_block, int major) {
  const cuda::LoraLinearPlan plan =
      cuda::plan_lora_linear({m, n, k, r, factor_float, dropout, weight_k_major, aligned},
                             {num_sms, shared_per_block, major});
  return pybind11::dict(
      arg("forward") = name_of(plan.forward), arg("forward_launches") = plan.forward_launches,
      arg("backward") = name_of(plan.backward), arg("backward_launches") = plan.backward_launches,
      arg("decode_cluster") = plan.decode.cluster, arg("decode_ctas") = plan.decode.ctas,
      arg("gemm") = dict_of(plan.gemm), arg("gemm_backward") = dict_of(plan.gemm_backward),
      arg("down") = dict_of(plan.down), arg("dy_pass") = dict_of(plan.dy_pass),
      arg("x_pass") = dict_of(plan.x_pass));
}

// The kernels that prefix attention would get on a device of these facts; a pure function.
pybind11::dict prefix_attention_plan(int64_t batch, int64_t q_heads, int64_t kv_heads,
                                     int64_t queries, int64_t keys, int64_t prefix,
                                     int64_t head_dim, bool shared_prefix, int num_sms,
                                     int shared_per_block, int major) {
  if (kv_heads <= 0 || q_heads % kv_heads != 0)
    throw pybind11::value_error("kv_heads must divide q_heads");
  const cuda::PrefixAttentionPlan plan = cuda::plan_prefix_attention(
      {batch, q_heads, kv_heads, queries, keys, prefix, head_dim, shared_prefix},
      {num_sms, shared_per_block, major});
  return pybind11::dict(
      arg("forward") = plan.cascade  ? "cascade decode"
                       : plan.decode ? "decode"
                                     : "query tiles",
      arg("head") = plan.head, arg("block_keys") = plan.block_keys,
      arg("query_rows") = plan.query_rows, arg("query_tiles") = plan.query_tiles,
      arg("cascade_tiles") = plan.cascade_tiles, arg("cascade_splits") = plan.cascade_splits,
      arg("key_splits") = plan.key_splits, arg("forward_ctas") = plan.forward_ctas,
      arg("forward_launches") = plan.forward_launches, arg("block_backward") = plan.block_backward,
      arg("key_tiles") = plan.key_tiles, arg("prefix_tiles") = plan.prefix_tiles,
      arg("prefix_splits") = plan.prefix_splits, arg("dq_ctas") = plan.dq_ctas,
      arg("dkv_ctas") = plan.dkv_ctas, arg("backward_launches") = plan.backward_launches);
}

}  // namespace

cpu::Isa cpu::chosen_isa() { return current_isa; }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and CPU features of fused_peft; importing it registers its torch ops.";
  m.def("build_info", &build_info, "How this binary was built, as a dict of strings.");
  m.def("available_cpu_isas", &available_isas, "Instruction sets that this processor can run.");
  m.def("cpu_isa", [] { return std::string(cpu::isa_name(cpu::chosen_isa())); });
  m.def("set_cpu_isa", &set_isa, arg("isa"),
        "Chooses the instruction set of the CPU kernels; ValueError where it is not available.");
  m.def("lora_linear_plan", &lora_linear_plan, arg("m"), arg("n"), arg("k"), arg("r"),
        pybind11::kw_only(), arg("factor_float") = false, arg("dropout") = false,
        arg("weight_k_major") = true, arg("aligned") = true, arg("num_sms"),
        arg("shared_per_block"), arg("major"),
        "The CUDA kernels and tiles that a LoRA layer would get on a device of these properties.");
  m.def("prefix_attention_plan", &prefix_attention_plan, arg("batch"), arg("q_heads"),
        arg("kv_heads"), arg("queries"), arg("keys"), arg("prefix"), arg("head_dim"),
        arg("shared_prefix") = true, pybind11::kw_only(), arg("num_sms"), arg("shared_per_block"),
        arg("major"),
        "The CUDA kernels and tiles that prefix attention would get on a device of these "
        "properties; backward_launches where all gradients are wanted.");
  m.attr("max_rank") = cpu::kMaxRank;
  m.attr("cuda_max_rank") = cuda::kMaxRank;
  m.attr("max_head_dim") = cpu::kMaxHeadDim;
}

}  // namespace fused_peft
