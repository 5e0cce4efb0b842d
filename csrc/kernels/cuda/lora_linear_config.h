// Which kernels and tiles a LoRA layer gets on a device: a pure function of the problem and the
// device, testable without either.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

namespace fused_peft::cuda {

struct LoraLinearShape {
  int64_t m = 0, n = 0, k = 0, r = 0;
  bool factor_float = false;  // lora_a, lora_b are float32, not x's dtype
  bool dropout = false;
  bool weight_k_major = true;  // weight [N, K] with K contiguous; else N contiguous
  bool aligned = true;         // rows of x, weight and y (dx) are 16-byte aligned and whole
  bool lora_a_aligned = true, lora_b_aligned = true;  // and those of the factors
  bool single_launch = true;  // LaunchContext::single_launch_state is there, s 16-byte aligned
  bool dx = true;             // the gradient of x is wanted
};

enum class ForwardPath : int32_t {
  kDecode = 0,     // one launch, W streamed once
  kFusedDown = 1,  // one launch, every CTA forms its own rows of s
  kTwoLaunches = 2,
  kSingleLaunch = 3,  // sm_90a: the first column of tiles forms s for the others
};

enum class BackwardPath : int32_t {
  kPasses = 0,        // over dy, over x, and the GEMM of dx
  kSingleLaunch = 1,  // sm_90a: the GEMM of dx makes of dy what the pass over it does
};

constexpr int64_t kDecodeMaxTokens = 16;
constexpr int kDecodeColumns = 32;  // of a CTA of the sm_80 decode kernel
constexpr int64_t kFusedMaxRank =
    64;  // larger ranks would double the tensor-core work of a 64-column tile
constexpr int64_t kMaxRank = 256;
constexpr int kSingleLaunchRows = 128;  // of a tile
constexpr int64_t kSingleLaunchRowTiles = 2048;
constexpr int64_t kSingleLaunchStateBytes = 32 * kSingleLaunchRowTiles + 256;

// The sm_90 kernels of narrow products take k in blocks whose rows are 128 bytes, the widest that
// TMA swizzles.
constexpr int kSkinnyBlockK = 64;
// Columns of W of a decode tile: as many as keep the share of lora_a in what a CTA reads, R /
// kDecodeBlockN of W's, at a half at most.
constexpr int kDecodeBlockN = 128;
// Rows of x of a lora_down tile: every tile reads all of lora_a, from L2, R / kDownRows of x's
// bytes.
constexpr int kDownRows = 64;
// Two CTAs an SM of 228 KiB, of which each CTA's first KiB is the system's.
constexpr int kSkinnySharedBytes = 113 * 1024;
constexpr int64_t kLargestTensorRow = int64_t{1} << 30;  // coordinates of TMA are 32 bits
constexpr int32_t kMaxCluster = 8;  // that every device with clusters can launch

struct DecodeChoice {
  int32_t cluster = 0;  // CTAs that split k; 0: the sm_80 kernel, whose warps do
  int64_t ctas = 0;
};

enum class GemmKernel : int32_t {
  kSm80 = 0,
  kPingpong = 1,     // sm_90a
  kCooperative = 2,  // sm_90a
};

struct GemmChoice {
  GemmKernel kernel = GemmKernel::kSm80;
  int32_t block_m = 0, block_n = 0;
  int64_t tiles = 0;
  int32_t cluster = 1;      // CTAs, below one another
  int64_t ctas = 0;         // tiles on sm_80, at most one per SM on sm_90a
  int32_t raster_rows = 8;  // row tiles (of clusters) in a column of the order
};

// Whether the package has kernels for sm_90a.
#ifdef FUSED_PEFT_SM90A
constexpr bool kHasSm90a = true;
#else
constexpr bool kHasSm90a = false;
#endif

struct SkinnyChoice {
  int32_t rank = 0;        // columns of the accumulators, R rounded up to a tile that is compiled
  int32_t row_blocks = 0;  // dy pass: 16-row blocks of a tile, each of which has a part of dlora_b
  int64_t ctas = 0;
  int32_t rank_blocks = 1;  // x pass: how often x is read
  int32_t cluster = 0;      // CTAs that split the reduction; 0: the sm_80 kernel, whose warps do
};

struct LoraLinearPlan {
  ForwardPath forward = ForwardPath::kTwoLaunches;
  BackwardPath backward = BackwardPath::kPasses;
  int32_t forward_launches = 0, backward_launches = 0;
  DecodeChoice decode;
  GemmChoice gemm, gemm_backward;
  SkinnyChoice down, dy_pass, x_pass;
};

constexpr int32_t rank_tile(int64_t r, int32_t largest) {
  return r <= 16 ? 16 : r <= 64 ? 64 : largest;
}

// Rows of the nearly square block of C that `ctas` tiles at a time should cover: it reads the least
// of A and B.
constexpr int32_t square_raster(int64_t ctas, int32_t block_m, int32_t block_n, int32_t cluster) {
  int32_t rows = 1;
  while (int64_t{rows + 1} * (rows + 1) * block_m <= ctas * block_n) ++rows;
  return rows < cluster ? 1 : rows / cluster;
}

// Clusters, CTAs and the order for a choice of kernel and tile.
constexpr GemmChoice spread_sm90(GemmChoice choice, int64_t m, int64_t n,
                                 const DeviceFacts& device) {
  const int64_t tiles_m = ceil_div(m, choice.block_m), tiles_n = ceil_div(n, choice.block_n);
  choice.tiles = tiles_m * tiles_n;
  // Two CTAs that copy half of b each read a quarter less. A row of tiles without a partner costs a
  // tile's time in every column: at most 1/16 of the work.
  if (choice.block_m == 128 && choice.block_n >= 128 && device.num_sms >= 2 &&
      (tiles_m % 2 == 0 || tiles_m >= 16))
    choice.cluster = 2;
  const int64_t clusters = ceil_div(tiles_m, choice.cluster) * tiles_n;
  const int64_t resident = device.num_sms / choice.cluster;
  choice.ctas = choice.cluster * (clusters < resident ? clusters : resident);
  choice.raster_rows = square_raster(choice.ctas, choice.block_m, choice.block_n, choice.cluster);
  return choice;
}

constexpr GemmChoice choose_gemm_sm90(int64_t m, int64_t n, const DeviceFacts& device) {
  GemmChoice choice;
  const auto take = [&](GemmKernel kernel, int32_t block_m, int32_t block_n) {
    choice.kernel = kernel;
    choice.block_m = block_m;
    choice.block_n = block_n;
    choice.tiles = ceil_div(m, block_m) * ceil_div(n, block_n);
  };
  // 256 columns: a wgmma of m64n256k16 reads 10 KB of shared memory in its 128 cycles, 80 bytes a
  // cycle of the 128 there are; m64n128k16 reads 96, m64n64k16 all 128. A tile for every SM counts
  // for more.
  take(GemmKernel::kCooperative, 128, 256);
  if (choice.tiles < device.num_sms) take(GemmKernel::kPingpong, 128, 128);
  if (choice.tiles < device.num_sms) take(GemmKernel::kPingpong, 64, 64);
  return spread_sm90(choice, m, n, device);
}

// sm_80: 128 x 128 tiles move half the bytes of 64 x 64 ones per FLOP, but only pay when there is
// one for every SM. A tensor copy needs rows and bases that are multiples of 16 bytes.
constexpr GemmChoice choose_gemm(int64_t m, int64_t n, bool aligned, const DeviceFacts& device) {
  if (kHasSm90a && device.major == 9 && aligned && m < int64_t{1} << 31)
    return choose_gemm_sm90(m, n, device);
  GemmChoice choice;
  const int64_t large = ceil_div(m, 128) * ceil_div(n, 128);
  choice.block_m = choice.block_n = aligned && large >= device.num_sms ? 128 : 64;
  choice.tiles = choice.ctas = ceil_div(m, choice.block_m) * ceil_div(n, choice.block_n);
  return choice;
}

// Tiles of the single launch: cooperative, 256 columns where every SM gets one.
constexpr GemmChoice choose_single_launch(int64_t m, int64_t n, const DeviceFacts& device) {
  GemmChoice choice;
  choice.kernel = GemmKernel::kCooperative;
  choice.block_m = kSingleLaunchRows;
  const int64_t wide = ceil_div(m, kSingleLaunchRows) * ceil_div(n, 256);
  choice.block_n = wide >= device.num_sms ? 256 : 64;
  return spread_sm90(choice, m, n, device);
}

// It spares a launch and the second pass over x (or dy), and costs nothing: its GEMM has the tiles
// and clusters of the one in two launches, and R / n more products, which the pass would have too.
constexpr bool fits_single_launch(const LoraLinearShape& p, const DeviceFacts& device) {
  if (!kHasSm90a || device.major != 9 || !p.single_launch) return false;
  if (!p.aligned || !p.lora_a_aligned || !p.lora_b_aligned || p.factor_float || p.r % 8 != 0)
    return false;
  if (p.dropout || !p.weight_k_major || p.r > kFusedMaxRank) return false;
  return ceil_div(p.m, kSingleLaunchRows) <= kSingleLaunchRowTiles;
}

constexpr ForwardPath choose_forward(const LoraLinearShape& p, const DeviceFacts& device) {
  if (p.dropout || !p.weight_k_major || p.r > kFusedMaxRank) return ForwardPath::kTwoLaunches;
  if (p.m <= kDecodeMaxTokens) return ForwardPath::kDecode;
  // The extra columns of a fused CTA cost R / 64 of its work. That is cheaper than a launch only
  // while the GEMM is itself no longer than a launch: one wave of tiles with a narrow output (k and
  // v projections).
  const int64_t tiles = ceil_div(p.m, 64) * ceil_div(p.n, 64);
  if (!p.factor_float && p.n <= 512 && tiles <= device.num_sms) return ForwardPath::kFusedDown;
  return fits_single_launch(p, device) ? ForwardPath::kSingleLaunch : ForwardPath::kTwoLaunches;
}

// How many CTAs split the k of a tile on sm_90. x and W are read at full rate only with megabytes
// under way, so as many as are resident at once: two an SM, a cluster's within one GPC, whose SMs
// are taken to be a multiple of the cluster. A CTA without `least` k-blocks would only wait.
constexpr int32_t choose_cluster(int64_t tiles, int64_t k, const DeviceFacts& device,
                                 int64_t least = 1) {
  int32_t cluster = kMaxCluster;
  while (cluster > 1 &&
         (tiles > 2 * (device.num_sms / cluster) || ceil_div(k, kSkinnyBlockK) < least * cluster))
    cluster /= 2;
  return cluster;
}

// The sm_80 kernels remain for rows that TMA cannot address (16-byte steps) and for devices with
// clusters but less shared memory (sm_120: 99 KiB).
constexpr bool has_skinny_sm90(const LoraLinearShape& p, const DeviceFacts& device) {
  return device.major >= 9 && device.shared_per_block >= kSkinnySharedBytes && p.aligned && p.k > 0;
}

constexpr DecodeChoice choose_decode(const LoraLinearShape& p, const DeviceFacts& device) {
  if (!has_skinny_sm90(p, device) || !p.lora_a_aligned) return {0, ceil_div(p.n, kDecodeColumns)};
  const int64_t tiles = ceil_div(p.n, kDecodeBlockN);
  const int32_t cluster = choose_cluster(tiles, p.k, device);
  return {cluster, tiles * cluster};
}

constexpr SkinnyChoice choose_down(const LoraLinearShape& p, const DeviceFacts& device) {
  SkinnyChoice choice = {rank_tile(p.r, 256), 1, ceil_div(p.m, 16), 1};
  // A tile of 256 ranks would be 128 accumulators a thread, and spills.
  if (choice.rank > 64 || !has_skinny_sm90(p, device) || !p.lora_a_aligned ||
      p.m > kLargestTensorRow)
    return choice;
  const int64_t tiles = ceil_div(p.m, kDownRows);
  choice.row_blocks = kDownRows / 16;
  choice.cluster = choose_cluster(tiles, p.k, device);
  choice.ctas = tiles * choice.cluster;
  return choice;
}

// Blocks of 64 rows or columns for a CTA of the sm_90 backward passes: swapping the sums of a
// cluster costs as much as reading one.
constexpr int64_t kLeastPassBlocks = 4;

constexpr int64_t dy_row_tiles(int64_t m, const SkinnyChoice& dy_pass) {
  return ceil_div(m, 16 * dy_pass.row_blocks);
}

// Rows of dy per tile: many, since each tile writes a partial dlora_b; few where there would be too
// few CTAs to fill half the device, or where float32 factors take the shared memory and registers.
constexpr SkinnyChoice choose_dy_pass(const LoraLinearShape& p, const DeviceFacts& device) {
  const int32_t rank = rank_tile(p.r, 256);
  if (rank <= 64 && has_skinny_sm90(p, device) && p.lora_b_aligned && p.n > 0 &&
      p.m <= kLargestTensorRow) {
    SkinnyChoice choice = {rank};
    const bool few = kMaxCluster * ceil_div(p.m, 128) < device.num_sms;
    choice.row_blocks = few || p.factor_float ? 4 : 8;
    const int64_t tiles = dy_row_tiles(p.m, choice);
    // Every CTA of a cluster reads the rows' s, in float32: a quarter of its bytes of dy at most.
    const int64_t least = rank / 8 > kLeastPassBlocks ? rank / 8 : kLeastPassBlocks;
    choice.cluster = choose_cluster(tiles, p.n, device, least);
    choice.ctas = tiles * choice.cluster;
    return choice;
  }
  int32_t blocks = rank == 16 ? 4 : rank == 64 ? (p.factor_float ? 2 : 4) : 1;
  if (rank == 16 && 2 * ceil_div(p.m, 64) < device.num_sms) blocks = 1;
  return {rank, blocks, ceil_div(p.m, 16 * blocks), 1};
}

constexpr SkinnyChoice choose_x_pass(const LoraLinearShape& p, const DeviceFacts& device) {
  const int32_t tile = rank_tile(p.r, 128);
  SkinnyChoice choice = {tile, 0, ceil_div(p.k, 32), static_cast<int32_t>(ceil_div(p.r, tile))};
  // 128 ranks would be 128 accumulators a thread, for which two CTAs an SM have no registers; read
  // twice, x would be more bytes than the sm_80 kernel's.
  if (tile > 64 || !has_skinny_sm90(p, device) || p.m > kLargestTensorRow) return choice;
  const int64_t tiles = ceil_div(p.k, kSkinnyBlockK);
  choice.cluster = choose_cluster(tiles, p.m, device, kLeastPassBlocks);
  choice.ctas = tiles * choice.cluster;
  return choice;
}

constexpr LoraLinearPlan plan_lora_linear(const LoraLinearShape& p, const DeviceFacts& device) {
  LoraLinearPlan plan;
  plan.forward = choose_forward(p, device);
  plan.forward_launches = plan.forward == ForwardPath::kTwoLaunches ? 2 : 1;
  if (plan.forward == ForwardPath::kDecode) plan.decode = choose_decode(p, device);
  if (plan.forward == ForwardPath::kSingleLaunch)
    plan.gemm = choose_single_launch(p.m, p.n, device);
  else
    plan.gemm = choose_gemm(p.m, p.n, p.aligned && plan.forward != ForwardPath::kFusedDown, device);
  const bool single = p.dx && fits_single_launch(p, device);
  plan.backward = single ? BackwardPath::kSingleLaunch : BackwardPath::kPasses;
  plan.backward_launches = single ? 2 : 3;
  plan.gemm_backward =
      single ? choose_single_launch(p.m, p.k, device) : choose_gemm(p.m, p.k, p.aligned, device);
  plan.down = choose_down(p, device);
  plan.dy_pass = choose_dy_pass(p, device);
  plan.x_pass = choose_x_pass(p, device);
  return plan;
}

}  // namespace fused_peft::cuda
