// What every kernel of the package shares: element types, status, views, threads, instruction sets.
// Plain types, no framework, no exceptions.
#pragma once

#include <cstdint>

namespace fused_peft {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

enum class Status : int32_t {
  kOk = 0,
  kUnsupported,   // no kernel covers this problem; the caller falls back
  kOutOfMemory,   // the workspace could not be allocated; no output was completed
  kLaunchFailed,  // the device's runtime refused a launch; its last error says why
};

// A view of a matrix: element (i, j) lies at data + i * row_stride + j * col_stride elements.
struct MatrixView {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
  DType dtype = DType::kFloat32;

  MatrixView transposed() const { return {data, col_stride, row_stride, dtype}; }
};

// Runs fn(context, task) for every task in [0, num_tasks), in any order, on up to num_threads
// threads, and returns when all are done. Results never depend on which thread runs a task.
struct ParallelFor {
  using Task = void (*)(void* context, int64_t task);
  void (*run)(int64_t num_tasks, Task fn, void* context) = nullptr;
  int num_threads = 1;
};

namespace cpu {

// Instruction sets from the least to the most demanding.
enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kNumIsa = 4;

const char* isa_name(Isa isa);
bool isa_available(Isa isa);  // compiled in, and this processor has it
Isa best_isa();               // the most demanding available one

}  // namespace cpu
}  // namespace fused_peft
