// What the ops' bindings share: dtypes, seeds, torch's threads, statuses.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "kernels/common.h"

namespace fused_peft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "fused_peft: ", name,
                      " has a dtype without a kernel; expected float32, bfloat16 or float16");
  }
}

inline bool same_device(const Tensor& tensor, const Tensor& x) {
  return tensor.is_cpu() == x.is_cpu() &&
         (x.is_cpu() || tensor.get_device_index() == x.get_device_index());
}

inline uint64_t seed_of(const std::optional<Tensor>& seed, double dropout_p) {
  if (dropout_p == 0.0) return 0;
  STD_TORCH_CHECK(seed.has_value(), "fused_peft: seed is None; dropout_p > 0 needs one");
  STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(),
                  "fused_peft: seed must be an int64 tensor with one element on the CPU");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
}

inline void run_on_torch_threads(int64_t num_tasks, ParallelFor::Task fn, void* context) {
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) fn(context, task);
  });
}

inline ParallelFor torch_threads() {
  return {run_on_torch_threads, static_cast<int>(torch::stable::get_num_threads())};
}

inline void check_status(Status status, const char* op) {
  STD_TORCH_CHECK(status != Status::kOutOfMemory, "fused_peft: ", op,
                  " could not allocate its workspace");
  STD_TORCH_CHECK(status == Status::kOk, "fused_peft: ", op, " has no CPU kernel for this problem");
}

}  // namespace fused_peft
