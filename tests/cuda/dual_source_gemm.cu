// A CUTLASS 3 GEMM for sm_90a with two sources in one main loop: y[m, n] = x[m, k] weight[n, k]^T +
// s[m, r] lora_b[n, r]^T in bfloat16. The TMA producer goes on with the second pair of descriptors
// once the k-tiles of the first are loaded; consumers, pipeline and epilogue are CUTLASS's own.
// Rows are padded to a multiple of 8 elements by the caller. The operands are read from files;
// device buffers in the order x, weight, s, lora_b, y.
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
constexpr int kAlignment = 8, kBlockK = 64;

constexpr int tiles(int k) { return (k + kBlockK - 1) / kBlockK; }

// The problem's k counts whole tiles: those of the first source, then those of the second. What a
// tile lacks is zeros that TMA fills in.
template <class Base>
struct DualSource : Base {
  struct Arguments {
    typename Base::Arguments first, second;
    int first_k = 0, second_k = 0;
  };
  struct Params : Base::Params {
    typename Base::Params second;
    int first_tiles = 0;
  };

  template <class Problem>
  static Params to_underlying_arguments(const Problem& problem, const Arguments& args, void*) {
    const auto source = [&](const typename Base::Arguments& operands, int k) {
      Problem own = problem;
      cute::get<2>(own) = k;
      return Base::to_underlying_arguments(own, operands, nullptr);
    };
    Params params;
    static_cast<typename Base::Params&>(params) = source(args.first, args.first_k);
    params.second = source(args.second, args.second_k);
    params.first_tiles = tiles(args.first_k);
    return params;
  }

  template <class Problem>
  static bool can_implement(const Problem& problem, const Arguments& args) {
    const auto fits = [&](const typename Base::Arguments& operands, int k) {
      Problem own = problem;
      cute::get<2>(own) = k;
      return Base::can_implement(own, operands);
    };
    return fits(args.first, args.first_k) && fits(args.second, args.second_k);
  }

  // A tile's coordinates are those of its source, which for both start at 0.
  template <class Inputs, class Coord, class TileIterator>
  CUTLASS_DEVICE void load(const Params& params, typename Base::MainloopPipeline pipeline,
                           typename Base::PipelineState state, const Inputs& inputs,
                           const Coord& block, TileIterator tile, int count, int thread,
                           uint32_t rank, typename Base::TensorStorage& storage) {
    Base::load(params, pipeline, state, inputs, block, tile, params.first_tiles, thread, rank,
               storage);
    state.advance(params.first_tiles);
    Base::load(params.second, pipeline, state, inputs, block, tile, count - params.first_tiles,
               thread, rank, storage);
  }
};

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment,
    Element, RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
using Mainloop = DualSource<typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
    ColumnMajor, kAlignment, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp>;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// A matrix out of a file of its elements.
Element* load_matrix(const char* path, int rows, int columns) {
  std::vector<Element> host(size_t(rows) * columns);
  std::FILE* file = std::fopen(path, "rb");
  if (!file || std::fread(host.data(), sizeof(Element), host.size(), file) != host.size()) {
    std::fprintf(stderr, "cannot read %s\n", path);
    std::exit(2);
  }
  std::fclose(file);
  Element* device;
  cudaMalloc(&device, host.size() * sizeof(Element));
  cudaMemcpy(device, host.data(), host.size() * sizeof(Element), cudaMemcpyHostToDevice);
  return device;
}

int main(int argc, char** argv) {
  if (argc != 9) {
    std::fprintf(stderr, "usage: %s m n k r x weight s lora_b\n", argv[0]);
    return 2;
  }
  const int m = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]),
            r = std::atoi(argv[4]);
  Element* x = load_matrix(argv[5], m, k);
  Element* weight = load_matrix(argv[6], n, k);
  Element* s = load_matrix(argv[7], m, r);
  Element* lora_b = load_matrix(argv[8], n, r);
  Element* y;
  cudaMalloc(&y, sizeof(Element) * m * n);
  const auto stride = [](auto kind, int rows, int columns) {
    return cutlass::make_cute_packed_stride(kind, {rows, columns, 1});
  };
  using StrideA = typename Kernel::StrideA;
  using StrideB = typename Kernel::StrideB;
  typename Mainloop::Arguments sources;
  sources.first = {x, stride(StrideA{}, m, k), weight, stride(StrideB{}, n, k)};
  sources.second = {s, stride(StrideA{}, m, r), lora_b, stride(StrideB{}, n, r)};
  sources.first_k = k;
  sources.second_k = r;
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, kBlockK * (tiles(k) + tiles(r)), 1},
      sources,
      {{1.0f, 0.0f}, nullptr, {}, y, stride(typename Kernel::StrideD{}, m, n)}};
  cudaDeviceGetAttribute(&arguments.hw_info.sm_count, cudaDevAttrMultiProcessorCount, 0);
  Gemm gemm;
  void* workspace = nullptr;
  if (const size_t bytes = Gemm::get_workspace_size(arguments)) cudaMalloc(&workspace, bytes);
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, workspace);
  if (status == cutlass::Status::kSuccess) status = gemm.run();
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("status %s, %s\n", cutlassGetStatusString(status), cudaGetErrorString(error));
  for (Element* buffer : {x, weight, s, lora_b, y}) cudaFree(buffer);
  return status != cutlass::Status::kSuccess || error != cudaSuccess;
}
