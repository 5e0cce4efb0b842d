// Drivers of the LoRA linear layer: which products are formed, in what order, and how their blocks
// are spread over threads. The blocks themselves are in the instruction sets' files.
#include "kernels/lora_linear.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/isa.h"

namespace fused_peft::cpu {
namespace {

// ---- dropout mask ------------------------------------------------------------------------------

struct Mask {
  Buffer<uint64_t> memory;
  MaskView view;
};

// The mask of x for this call. It lives in the workspace only: 1 bit an element, never saved.
bool make_mask(const LoraLinearParams& p, const KernelTable& table, const ParallelFor& parallel,
               Mask& mask) {
  if (p.dropout_p <= 0.0) return true;
  const int64_t words = ceil_div(p.k, 64);
  mask.memory = allocate<uint64_t>(p.m * words);
  if (!mask.memory) return false;
  mask.view = {mask.memory.get(), words};
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  const int64_t rows = std::max<int64_t>(1, ceil_div(p.m, 4 * parallel.num_threads));
  return for_each_task(table.scratch_bytes, parallel, ceil_div(p.m, rows),
                       [&](int64_t task, char*) {
                         for (int64_t i = task * rows; i < std::min(p.m, (task + 1) * rows); ++i)
                           table.dropout_row(p.seed, threshold,
                                             static_cast<uint64_t>(i) * static_cast<uint64_t>(p.k),
                                             p.k, mask.memory.get() + i * words);
                       });
}

// ---- the pair of products: s, then the product that consumes it ---------------------------------

// How the blocks of C go to tasks: row_parts x col_parts of them, each in blocks of rows.
struct Grid {
  int64_t row_parts, part_rows;
  int64_t col_parts, part_cols;  // part_cols is a multiple of the panel
};

// Measured on Zen 5 (benchmarks/bench_lora_linear.py), in units of the time that one row of C takes
// for one element of the weight: packing the element once, and meeting at a barrier.
constexpr double kPackRows = 8.0;
constexpr double kBarrier = 6.0e5;

// The split of C with the least time for the slowest thread. Splitting the columns packs every
// panel once but needs all of s before it starts; splitting the rows packs panels once a part.
Grid choose_grid(int64_t m, int64_t n, int64_t k, int threads, const KernelTable& table) {
  const int64_t panels = ceil_div(n, table.panel);
  Grid best{};
  double best_cost = 0.0;
  for (int64_t col_parts = 1; col_parts <= std::min<int64_t>(threads, panels); ++col_parts) {
    const int64_t row_parts = std::max<int64_t>(1, threads / col_parts);
    const int64_t rows = round_up(ceil_div(m, row_parts), table.row_tile);
    const int64_t cols = ceil_div(panels, col_parts) * table.panel;
    const auto packed = static_cast<double>(ceil_div(rows, kMaxBlockRows)) * kPackRows;
    const double cost = static_cast<double>(cols * k) * (static_cast<double>(rows) + packed) +
                        (col_parts > 1 ? kBarrier : 0.0);
    if (best.row_parts == 0 || cost < best_cost) {
      best = {ceil_div(m, rows), rows, ceil_div(n, cols), cols};
      best_cost = cost;
    }
  }
  return best;
}

// Runs down (null: s is there already), then main, whose low-rank tail reads down's output.
bool run_products(const Gemm* down, const Gemm& main, const KernelTable& table,
                  const ParallelFor& parallel) {
  const int64_t depth = main.k > 0 ? main.k : main.r;
  const Grid grid = choose_grid(main.m, main.n, depth, parallel.num_threads, table);
  const bool fuse = grid.col_parts == 1;
  if (down && !fuse) {
    const int64_t rows =
        std::min(kMaxBlockRows, round_up(ceil_div(down->m, parallel.num_threads), table.row_tile));
    const auto task = [&](int64_t i, char* scratch) {
      table.gemm_block(*down, i * rows, std::min(down->m, (i + 1) * rows), 0, down->n, scratch);
    };
    if (!for_each_task(table.scratch_bytes, parallel, ceil_div(down->m, rows), task)) return false;
  }
  const auto task = [&](int64_t i, char* scratch) {
    const int64_t first_row = i / grid.col_parts * grid.part_rows;
    const int64_t last_row = std::min(main.m, first_row + grid.part_rows);
    const int64_t n0 = i % grid.col_parts * grid.part_cols;
    const int64_t n1 = std::min(main.n, n0 + grid.part_cols);
    for (int64_t m0 = first_row; m0 < last_row; m0 += kMaxBlockRows) {
      const int64_t m1 = std::min(last_row, m0 + kMaxBlockRows);
      if (down && fuse) table.gemm_block(*down, m0, m1, 0, down->n, scratch);
      table.gemm_block(main, m0, m1, n0, n1, scratch);
    }
  };
  return for_each_task(table.scratch_bytes, parallel, grid.row_parts * grid.col_parts, task);
}

// The product whose tail is s up. Without a weight it is the tail alone: k is 0 then, and up stands
// in for B, of which only the dtype is looked at.
Gemm main_product(const LoraLinearParams& p, const MatrixView& rows, int64_t n, int64_t k,
                  const MatrixView& weight, const float* s, const MatrixView& up) {
  Gemm g;
  g.m = p.m;
  g.n = n;
  g.k = weight.data ? k : 0;
  g.a = rows;
  g.b = weight.data ? weight : MatrixView{up.data, up.row_stride, up.col_stride, rows.dtype};
  g.r = p.r;
  g.s = s;
  g.up = up;
  return g;
}

Gemm down_product(const LoraLinearParams& p, const MatrixView& rows, const MaskView& mask,
                  int64_t k, const MatrixView& columns, float* out) {
  Gemm g;
  g.m = p.m;
  g.n = p.r;
  g.k = k;
  g.a = rows;
  g.a_mask = mask;
  g.b = columns;
  g.epilogue.scale = p.scaling / (1.0 - p.dropout_p);
  g.epilogue.out = out;
  g.epilogue.row_stride = p.r;
  return g;
}

// ---- few rows ----------------------------------------------------------------------------------

// The update alone has only R products to a sum: from three rows on, packing lora_b is cheaper than
// adding up the lanes of each (Zen 5, N = K = 2048, R = 16).
constexpr int64_t kDecodeUpdateRows = 2;

bool use_decode(const LoraLinearParams& p) {
  if (!p.weight.data) return p.m <= kDecodeUpdateRows;
  return p.m <= kDecodeRows && p.weight.col_stride == 1;
}

bool run_decode(const Decode& d, const KernelTable& table, const ParallelFor& parallel) {
  constexpr int64_t kColumnsOfBlock = 64;  // short enough to spread, long enough to stream
  const int64_t columns =
      std::max(kColumnsOfBlock, round_up(ceil_div(d.n, 4 * parallel.num_threads), kColumnsOfBlock));
  return for_each_task(table.scratch_bytes, parallel, ceil_div(d.n, columns),
                       [&](int64_t task, char*) {
                         table.decode_block(d, task * columns, std::min(d.n, (task + 1) * columns));
                       });
}

// s of few rows; x is p.x or its floats.
bool decode_down(const LoraLinearForward& args, const MatrixView& x, const Mask& mask,
                 const KernelTable& table, const ParallelFor& parallel) {
  const LoraLinearParams& p = args.problem;
  if (mask.view.bits) {
    const Gemm down = down_product(p, p.x, mask.view, p.k, p.lora_a.transposed(), args.s);
    const auto task = [&](int64_t, char* scratch) {
      table.gemm_block(down, 0, p.m, 0, p.r, scratch);
    };
    return for_each_task(table.scratch_bytes, parallel, 1, task);
  }
  Decode down;
  down.m = p.m;
  down.n = p.r;
  down.k = p.k;
  down.x = x;
  down.weight = p.lora_a;
  down.epilogue.scale = p.scaling;
  down.epilogue.out = args.s;
  down.epilogue.row_stride = p.r;
  table.decode_block(down, 0, p.r);
  return true;
}

bool decode_forward(const LoraLinearForward& args, const Mask& mask, const KernelTable& table,
                    const ParallelFor& parallel) {
  const LoraLinearParams& p = args.problem;
  const auto multiplies_directly = [&](const MatrixView& w) {
    return p.x.dtype == w.dtype &&
           (p.x.dtype == DType::kFloat32 || (p.x.dtype == DType::kBFloat16 && table.bf16_dot));
  };
  Buffer<float> x_float;
  MatrixView float_view = p.x;
  const bool update_alone = !p.weight.data;
  const bool main_is_direct = update_alone || multiplies_directly(p.weight);
  if (!main_is_direct || !multiplies_directly(p.lora_a)) {
    x_float = allocate<float>(p.m * p.k);
    if (!x_float) return false;
    table.to_float(p.x, p.m, p.k, x_float.get(), p.k);
    float_view = {x_float.get(), p.k, 1, DType::kFloat32};
  }
  const MatrixView& down_rows = multiplies_directly(p.lora_a) ? p.x : float_view;
  if (!decode_down(args, down_rows, mask, table, parallel)) return false;
  Decode main;
  main.m = p.m;
  main.n = p.n;
  main.epilogue = {1.0, p.bias, args.y, p.x.dtype, args.y_row_stride, 1, {}};
  if (update_alone) {  // s lora_b^T is the product itself
    main.k = p.r;
    main.x = {args.s, p.r, 1, DType::kFloat32};
    main.weight = p.lora_b;
    main.epilogue.addend = args.base;
  } else {
    main.k = p.k;
    main.r = p.r;
    main.x = main_is_direct ? p.x : float_view;
    main.weight = p.weight;
    main.s = args.s;
    main.lora_b = p.lora_b;
  }
  return run_decode(main, table, parallel);
}

// ---- adapter gradients -------------------------------------------------------------------------

// out[r, c] = sum over m of rows[r, m] * columns[m, c]
struct AdapterGradient {
  Buffer<float> rows;  // [R, M], s or ds transposed
  Gemm gemm;
  int64_t panels = 0;
};

bool prepare_gradient(const LoraLinearParams& p, const KernelTable& table, const float* s,
                      const MatrixView& columns, const MaskView& mask, int64_t n, void* out,
                      DType dtype, int64_t row_stride, int64_t col_stride, AdapterGradient& g) {
  g.rows = allocate<float>(p.r * p.m);
  if (!g.rows) return false;
  table.transpose(s, p.r, p.m, p.r, g.rows.get(), p.m);
  g.gemm.m = p.r;
  g.gemm.n = n;
  g.gemm.k = p.m;
  g.gemm.a = {g.rows.get(), p.m, 1, DType::kFloat32};
  g.gemm.b = columns;
  g.gemm.b_mask = mask;
  g.gemm.epilogue = {1.0, {}, out, dtype, row_stride, col_stride, {}};
  g.panels = ceil_div(n, table.panel);
  return true;
}

bool run_gradients(const AdapterGradient& a, const AdapterGradient& b, const KernelTable& table,
                   const ParallelFor& parallel) {
  return for_each_task(
      table.scratch_bytes, parallel, a.panels + b.panels, [&](int64_t task, char* scratch) {
        const AdapterGradient& g = task < a.panels ? a : b;
        const int64_t n0 = (task < a.panels ? task : task - a.panels) * table.panel;
        table.gemm_block(g.gemm, 0, g.gemm.m, n0, std::min(g.gemm.n, n0 + table.panel), scratch);
      });
}

bool bias_gradient(const LoraLinearBackward& args, const KernelTable& table,
                   const ParallelFor& parallel) {
  const LoraLinearParams& p = args.problem;
  return for_each_task(
      table.scratch_bytes, parallel, ceil_div(p.n, table.panel), [&](int64_t task, char*) {
        table.column_sum(args.dy, p.m, task * table.panel, std::min(p.n, (task + 1) * table.panel),
                         args.dbias, p.bias.dtype);
      });
}

void zero(void* out, int64_t count, DType dtype) {
  if (out) std::fill_n(static_cast<char*>(out), count * element_size(dtype), char{0});
}

bool covered(const LoraLinearParams& p, Isa isa) {
  return isa_available(isa) && p.m >= 0 && p.n >= 1 && p.k >= 1 && p.r >= 1 && p.r <= kMaxRank &&
         p.x.col_stride == 1 && p.lora_a.col_stride == 1 && p.lora_b.col_stride == 1 &&
         (!p.weight.data ||
          (p.x.dtype == p.weight.dtype && (p.weight.col_stride == 1 || p.weight.row_stride == 1)));
}

Status status_of(bool ok) { return ok ? Status::kOk : Status::kOutOfMemory; }

}  // namespace

Status lora_linear_forward(const LoraLinearForward& args, Isa isa, const ParallelFor& parallel) {
  const LoraLinearParams& p = args.problem;
  if (!covered(p, isa)) return Status::kUnsupported;
  if (!p.weight.data && (args.base.dtype != p.x.dtype || args.base.col_stride != 1))
    return Status::kUnsupported;
  if (p.m == 0) return Status::kOk;
  const KernelTable& table = kernel_table(isa);
  Mask mask;
  if (!make_mask(p, table, parallel, mask)) return Status::kOutOfMemory;
  if (use_decode(p)) return status_of(decode_forward(args, mask, table, parallel));
  const Gemm down = down_product(p, p.x, mask.view, p.k, p.lora_a.transposed(), args.s);
  Gemm main = main_product(p, p.x, p.n, p.k, p.weight.transposed(), args.s, p.lora_b.transposed());
  main.epilogue = {1.0, p.bias, args.y, p.x.dtype, args.y_row_stride, 1, {}};
  if (!p.weight.data) main.epilogue.addend = args.base;
  return status_of(run_products(&down, main, table, parallel));
}

Status lora_linear_backward(const LoraLinearBackward& args, Isa isa, const ParallelFor& parallel) {
  const LoraLinearParams& p = args.problem;
  if (!covered(p, isa) || args.dy.col_stride != 1 || args.dy.dtype != p.x.dtype)
    return Status::kUnsupported;
  if (p.m == 0) {
    zero(args.dlora_a, p.r * p.k, p.lora_a.dtype);
    zero(args.dlora_b, p.n * p.r, p.lora_b.dtype);
    if (args.dbias) zero(args.dbias, p.n, p.bias.dtype);
    return Status::kOk;
  }
  const KernelTable& table = kernel_table(isa);
  Mask mask;
  if (!make_mask(p, table, parallel, mask)) return Status::kOutOfMemory;
  Buffer<float> ds;
  if (args.dx || args.dlora_a) {
    ds = allocate<float>(p.m * p.r);
    if (!ds) return Status::kOutOfMemory;
  }
  const Gemm down = down_product(p, args.dy, MaskView{}, p.n, p.lora_b, ds.get());
  if (args.dx) {
    Gemm main = main_product(p, args.dy, p.k, p.n, p.weight, ds.get(), p.lora_a);
    main.tail_mask = mask.view;
    main.epilogue = {1.0, {}, args.dx, p.x.dtype, p.k, 1, {}};
    if (!run_products(&down, main, table, parallel)) return Status::kOutOfMemory;
  } else if (args.dlora_a) {
    if (!run_products(nullptr, down, table, parallel)) return Status::kOutOfMemory;  // ds alone
  }
  AdapterGradient grad_a, grad_b;
  if (args.dlora_a && !prepare_gradient(p, table, ds.get(), p.x, mask.view, p.k, args.dlora_a,
                                        p.lora_a.dtype, p.k, 1, grad_a))
    return Status::kOutOfMemory;
  if (args.dlora_b && !prepare_gradient(p, table, args.s, args.dy, MaskView{}, p.n, args.dlora_b,
                                        p.lora_b.dtype, 1, p.r, grad_b))
    return Status::kOutOfMemory;
  if (!run_gradients(grad_a, grad_b, table, parallel)) return Status::kOutOfMemory;
  return status_of(!args.dbias || bias_gradient(args, table, parallel));
}

}  // namespace fused_peft::cpu
