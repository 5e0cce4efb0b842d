// A CUTLASS 3 GEMM for sm_90a by the collective builders: TMA with multicast over a cluster of 2 x
// 1, warp-specialised cooperative wgmma, TMA epilogue. D[m, n] = A[m, k] B[n, k]^T in bfloat16,
// device buffers in the order A, B, D.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using TileShape = cute::Shape<cute::_128, cute::_128, cute::_64>;
using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
constexpr int kAlignment = 8;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment,
    Element, RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
    ColumnMajor, kAlignment, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

std::vector<Element> integers(int count, int seed) {
  std::vector<Element> values(count);
  for (int i = 0; i < count; ++i) values[i] = Element(float((i * 7 + seed) % 11 - 5));
  return values;
}

Element* to_device(const std::vector<Element>& host) {
  Element* device;
  cudaMalloc(&device, host.size() * sizeof(Element));
  cudaMemcpy(device, host.data(), host.size() * sizeof(Element), cudaMemcpyHostToDevice);
  return device;
}

int main(int argc, char** argv) {
  const int m = argc > 1 ? std::atoi(argv[1]) : 256, n = argc > 2 ? std::atoi(argv[2]) : 128,
            k = argc > 3 ? std::atoi(argv[3]) : 128;
  Element* a = to_device(integers(m * k, 1));
  Element* b = to_device(integers(n * k, 4));
  Element* d;
  cudaMalloc(&d, sizeof(Element) * m * n);
  const auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1});
  const auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1});
  const auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1});
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                     {m, n, k, 1},
                                     {a, stride_a, b, stride_b},
                                     {{1.0f, 0.0f}, nullptr, {}, d, stride_d}};
  int sms = 0;
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
  arguments.hw_info.sm_count = sms;
  Gemm gemm;
  void* workspace = nullptr;
  if (const size_t bytes = Gemm::get_workspace_size(arguments)) cudaMalloc(&workspace, bytes);
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, workspace);
  if (status == cutlass::Status::kSuccess) status = gemm.run();
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("status %s, %s\n", cutlassGetStatusString(status), cudaGetErrorString(error));
  cudaFree(a);
  cudaFree(b);
  cudaFree(d);
  return status != cutlass::Status::kSuccess || error != cudaSuccess;
}
