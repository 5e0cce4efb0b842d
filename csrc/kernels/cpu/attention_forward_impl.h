// Forward pass of prefix attention for the queries of one key head.
//
// Rows are (query, head of the group) pairs, query-major, so that the rows of a tile stand close
// together and causal tiles stop early. Keys and values of the list are packed once for all rows;
// scores exist for kBlockRows x kBlockKeys at a time, in the L1 cache, where the softmax runs over
// them with a running maximum.
#include "kernels/cpu/attention_tile_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

constexpr int64_t kBlockRows = 4 * kAttnRows;
constexpr int64_t kBlockKeys = 128;
constexpr int64_t kPackedKeys = 512;  // keys and values of a head of 64: 128 KiB
static_assert(kBlockKeys % kAttnCols == 0 && kPackedKeys % kBlockKeys == 0);

template <class Operand>
struct ForwardScratch {
  using Element = typename Operand::Element;
  Element* q;         // [rows, D]
  float* k;           // [panel of keys][D steps, kAttnCols]
  float* v;           // [panel of D][key steps, vecs * kLanes]
  char* staged;       // [kAttnCols, D]
  uint8_t* seen;      // [kPackedKeys], key_mask's holes
  float* scores;      // [kBlockRows, kBlockKeys]
  Element* weights;   // [kBlockRows, kBlockKeys]
  float* acc;         // [rows, padded D]
  float* m;           // [rows] running maximum of the scores
  float* l;           // [rows] running sum of the weights
  KeyRange* visible;  // [rows], places in the list
  uint64_t* keep;     // [kBlockKeys / 64 + 1] dropout
  int64_t bytes;

  ForwardScratch(const PrefixAttentionParams& p, int64_t rows, char* memory) {
    const HeadPanels panels(p.head_dim);
    const int64_t steps = (p.head_dim + Operand::kStep - 1) / Operand::kStep;
    ScratchPieces pieces(memory);
    q = pieces.take<Element>(rows * p.head_dim);
    k = pieces.take<float>(kPackedKeys * steps);
    v = pieces.take<float>(kPackedKeys / Operand::kStep * panels.padded());
    staged = pieces.take<char>(kAttnCols * p.head_dim * element_size(p.dtype));
    seen = pieces.take<uint8_t>(kPackedKeys + kLanes);
    scores = pieces.take<float>(kBlockRows * kBlockKeys);
    weights = pieces.take<Element>(kBlockRows * kBlockKeys);
    acc = pieces.take<float>(rows * panels.padded());
    m = pieces.take<float>(rows + kLanes);
    l = pieces.take<float>(rows + kLanes);
    visible = pieces.take<KeyRange>(rows);
    keep = pieces.take<uint64_t>(kBlockKeys / 64 + 1);
    bytes = pieces.used();
  }
};

// What a row sees of a block of keys, as columns of the block: [0, prefix) and [lo, hi).
struct RowColumns {
  int64_t prefix, lo, hi;
  const uint8_t* seen;  // [columns], null where none is masked

  bool whole(int64_t c0, int64_t c1) const {
    return !seen && (c1 <= prefix || (c1 <= hi && (c0 >= lo || lo <= prefix)));
  }
  VecI lanes(int64_t column) const {
    const VecI c = lane_indices() + static_cast<int32_t>(column);
    VecI in = (c < static_cast<int32_t>(prefix)) |
              ((c >= static_cast<int32_t>(lo)) & (c < static_cast<int32_t>(hi)));
    if (seen)
      for (int i = 0; i < kLanes; ++i) in[i] = seen[column + i] ? in[i] : 0;
    return in;
  }
};

// Largest score of the row; the scores of masked columns become -inf.
inline float mask_and_max(float* scores, int64_t columns, const RowColumns& row) {
  Vec largest = broadcast(kMinusInfinity);
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec x = load(scores + c);
    if (!row.whole(c, c + kLanes)) {
      x = select(row.lanes(c), x, broadcast(kMinusInfinity));
      store(scores + c, x);
    }
    largest = vec_max(largest, x);
  }
  return fold_lanes(largest, vec_max);
}

// weights = 2^(scale * scores - m), dropped where keep says so; returns their sum before dropout.
template <class Operand>
inline float exponentiate(const float* scores, int64_t columns, float scale, float m,
                          const uint64_t* keep, typename Operand::Element* weights) {
  const Vec factor = broadcast(scale), offset = broadcast(m);
  Vec sum = {};
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec w = exp2_vec<Operand::kExpDegree>(load(scores + c) * factor - offset);
    sum += w;
    if (keep) w = keep_lanes(w, mask_bits(keep, c));
    store(weights + c, w);
  }
  return fold_lanes(sum, [](Vec a, Vec b) { return a + b; });
}

template <class Operand>
class ForwardRows {
 public:
  using Element = typename Operand::Element;

  ForwardRows(const PrefixAttentionForward& args, const AttentionForwardBlock& block, char* memory)
      : args_(args),
        p_(args.problem),
        block_(block),
        group_(p_.q_heads / p_.kv_heads),
        rows_((block.s1 - block.s0) * group_),
        steps_((p_.head_dim + Operand::kStep - 1) / Operand::kStep),
        panels_(p_.head_dim),
        scale_(static_cast<float>(p_.scale / kLog2)),
        scratch_(p_, rows_, memory),
        batch_(batch_keys(p_, block.batch)),
        position_(first_position(p_, block.batch) + block.s0),
        list_(key_list(p_, batch_.range, position_, block.s1 - block.s0)) {}

  void run() {
    prepare_rows();
    for (int64_t u0 = 0; u0 < list_.count; u0 += kPackedKeys) {
      const int64_t keys = smaller(kPackedKeys, list_.count - u0);
      pack_keys(u0, keys);
      for (int64_t r0 = 0; r0 < rows_; r0 += kBlockRows)
        for (int64_t k0 = 0; k0 < keys; k0 += kBlockKeys)
          attend(r0, smaller(rows_, r0 + kBlockRows), u0, k0, smaller(keys, k0 + kBlockKeys));
    }
    finish_softmax();
    for (int64_t r = 0; r < rows_; ++r) write_row(r);
  }

 private:
  int64_t head(int64_t row) const { return block_.kv_head * group_ + row % group_; }
  int64_t query(int64_t row) const { return block_.s0 + row / group_; }

  void prepare_rows() {
    const int64_t size = element_size(p_.dtype);
    for (int64_t r = 0; r < rows_; ++r) {
      const char* row = static_cast<const char*>(p_.q.data) +
                        (block_.batch * p_.q.batch_stride + head(r) * p_.q.head_stride +
                         query(r) * p_.q.row_stride) *
                            size;
      stage_row<Operand>(row, p_.dtype, p_.head_dim, scratch_.q + r * p_.head_dim);
      const KeyRange range = keys_of_query(p_, batch_.range, position_ + r / group_);
      const int64_t shift = list_.prefix - list_.first;
      scratch_.visible[r] = {range.lo + shift, range.hi > range.lo ? range.hi + shift : 0};
      scratch_.m[r] = kMinusInfinity;
      scratch_.l[r] = 0.0F;
    }
    for (int64_t r = rows_; r < rows_ + kLanes; ++r) scratch_.m[r] = scratch_.l[r] = 0.0F;
    for (int64_t i = 0; i < rows_ * panels_.padded(); ++i) scratch_.acc[i] = 0.0F;
  }

  void pack_keys(int64_t u0, int64_t keys) {
    const int64_t size = element_size(p_.dtype);
    for (int64_t k0 = 0; k0 < keys; k0 += kAttnCols) {
      const int64_t count = smaller(kAttnCols, keys - k0);
      const RowsOfKeys k = rows_of_keys(list_, p_.prefix_k, p_.k, block_.batch, block_.kv_head,
                                        u0 + k0, count, p_.head_dim, size, scratch_.staged);
      pack_as_columns<Operand>(k, p_.dtype, count, p_.head_dim, scratch_.k + k0 * steps_);
      const RowsOfKeys v = rows_of_keys(list_, p_.prefix_v, p_.v, block_.batch, block_.kv_head,
                                        u0 + k0, count, p_.head_dim, size, scratch_.staged);
      for (int panel = 0; panel < panels_.count; ++panel)
        pack_as_rows<Operand>(v, p_.dtype, count, panels_.first(panel),
                              p_.head_dim - panels_.first(panel), panels_.vecs_of(panel),
                              v_panel(panel, k0));
    }
    if (batch_.mask) {
      for (int64_t i = 0; i < kPackedKeys + kLanes; ++i) {
        const int64_t u = u0 + i;
        scratch_.seen[i] = u < list_.prefix ||
                           (u < list_.count && batch_.mask[u - list_.prefix + list_.first] != 0);
      }
    }
  }

  float* v_panel(int panel, int64_t key) const {
    return scratch_.v + kPackedKeys / Operand::kStep * panels_.first(panel) +
           key / Operand::kStep * panels_.vecs_of(panel) * kLanes;
  }

  // Columns of the block that rows [r0, r1) may see: 0 where they see none.
  int64_t columns_seen(int64_t r0, int64_t r1, int64_t u, int64_t columns) const {
    int64_t lo = scratch_.visible[r0].lo, hi = 0;
    for (int64_t r = r0; r < r1; ++r) {
      lo = smaller(lo, scratch_.visible[r].lo);
      hi = larger(hi, scratch_.visible[r].hi);
    }
    if (u >= list_.prefix && (hi <= u || lo >= u + columns)) return 0;
    return smaller(columns, larger(list_.prefix, hi) - u);
  }

  // Rows [r0, r1) against packed keys [k0, k1).
  void attend(int64_t r0, int64_t r1, int64_t u0, int64_t k0, int64_t k1) {
    const int64_t u = u0 + k0;
    const int64_t block_columns = columns_seen(r0, r1, u, k1 - k0);
    if (block_columns <= 0) return;
    int64_t columns[kBlockRows / kAttnRows];
    for (int64_t r = r0; r < r1; r += kAttnRows)
      columns[(r - r0) / kAttnRows] = columns_seen(r, smaller(r1, r + kAttnRows), u, k1 - k0);
    for (int64_t c = 0; c < block_columns; c += kAttnCols)
      for (int64_t r = r0; r < r1; r += kAttnRows)
        score_tile(r0, r, smaller(r1, r + kAttnRows), k0, c, columns[(r - r0) / kAttnRows]);
    for (int64_t r = r0; r < r1; r += kAttnRows)
      weigh_tile(r0, r, smaller(r1, r + kAttnRows), u, k0, columns[(r - r0) / kAttnRows]);
  }

  void score_tile(int64_t block_row, int64_t r0, int64_t r1, int64_t k0, int64_t c,
                  int64_t columns) {
    if (c >= columns) return;
    const auto vecs = static_cast<int>(smaller(kAttnVecs, (columns - c + kLanes - 1) / kLanes));
    AttnTile tile{};
    tile.a = reinterpret_cast<const char*>(scratch_.q + r0 * p_.head_dim);
    tile.lda = p_.head_dim * static_cast<int64_t>(sizeof(Element));
    tile.b = scratch_.k + (k0 + c) * steps_;
    tile.ldb = kAttnCols;
    tile.steps = steps_;
    tile.c = scratch_.scores + (r0 - block_row) * kBlockKeys + c;
    tile.ldc = kBlockKeys;
    run_tile<Operand>(tile, static_cast<int>(r1 - r0), vecs);
  }

  // Softmax of the tile's rows over the block, and their sums of values.
  void weigh_tile(int64_t block_row, int64_t r0, int64_t r1, int64_t u, int64_t k0,
                  int64_t columns) {
    if (columns <= 0) return;
    float before[kAttnRows + kLanes] = {}, alpha[kAttnRows + kLanes];
    const int64_t steps = (columns + Operand::kStep - 1) / Operand::kStep;
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t i = r - block_row;
      const KeyRange& visible = scratch_.visible[r];
      const RowColumns row{list_.prefix - u, visible.lo - u, visible.hi - u,
                           batch_.mask ? scratch_.seen + k0 : nullptr};
      const float largest = mask_and_max(scratch_.scores + i * kBlockKeys, columns, row) * scale_;
      const float m = largest > scratch_.m[r] ? largest : scratch_.m[r];
      // A row that has seen no key yet has no maximum: any finite one gives weights of 0.
      const float offset = m == kMinusInfinity ? 0.0F : m;
      before[r - r0] = scratch_.m[r] - offset;
      scratch_.m[r] = m;
      block_sum_[r - r0] =
          exponentiate<Operand>(scratch_.scores + i * kBlockKeys, columns, scale_, offset,
                                dropped(r, u, columns), scratch_.weights + i * kBlockKeys);
    }
    for (int64_t i = 0; i < r1 - r0; i += kLanes)
      store(alpha + i, exp2_vec<FloatOperand::kExpDegree>(load(before + i)));
    for (int64_t r = r0; r < r1; ++r)
      scratch_.l[r] = scratch_.l[r] * alpha[r - r0] + block_sum_[r - r0];
    for (int panel = 0; panel < panels_.count; ++panel) {
      AttnTile tile{};
      tile.a = reinterpret_cast<const char*>(scratch_.weights + (r0 - block_row) * kBlockKeys);
      tile.lda = kBlockKeys * static_cast<int64_t>(sizeof(Element));
      tile.b = v_panel(panel, k0);
      tile.ldb = int64_t{panels_.vecs_of(panel)} * kLanes;
      tile.steps = steps;
      tile.c = scratch_.acc + r0 * panels_.padded() + panels_.first(panel);
      tile.ldc = panels_.padded();
      tile.alpha = alpha;
      tile.accumulate = true;
      run_tile<Operand>(tile, static_cast<int>(r1 - r0), panels_.vecs_of(panel));
    }
  }

  // Bits of the weights of row r that dropout keeps, null without dropout.
  const uint64_t* dropped(int64_t r, int64_t u, int64_t columns) {
    if (p_.dropout_p <= 0.0) return nullptr;
    dropout_columns(p_, block_.dropout_threshold, list_, {block_.batch, head(r), query(r)}, u,
                    columns, scratch_.keep);
    return scratch_.keep;
  }

  // m as the factor that turns sums into averages, and lse.
  void finish_softmax() {
    const auto kept = static_cast<float>(1.0 - p_.dropout_p);
    const bool wide = p_.dtype == DType::kFloat32;
    for (int64_t r = 0; r < rows_; ++r) {
      if (wide) write_lse(r, scratch_.l[r] == 0.0F ? -__builtin_inf() : wide_lse(r));
    }
    for (int64_t r = 0; r < rows_; r += kLanes) {
      const Vec m = load(scratch_.m + r), l = load(scratch_.l + r);
      const VecI some = l != 0.0F;  // NaN counts
      const Vec lse = (m + log2_vec(l)) * static_cast<float>(kLog2);
      store(scratch_.m + r, select(some, 1.0F / (l * kept), Vec{}));
      store(scratch_.l + r, select(some, lse, broadcast(kMinusInfinity)));
    }
    for (int64_t r = 0; r < rows_; ++r) {
      if (!wide) write_lse(r, scratch_.l[r]);
    }
  }

  double wide_lse(int64_t r) const {
    return (double{scratch_.m[r]} + __builtin_log2(double{scratch_.l[r]})) * kLog2;
  }

  template <class T>
  void write_lse(int64_t r, T value) {
    static_cast<T*>(args_.lse)[(block_.batch * p_.q_heads + head(r)) * p_.queries + query(r)] =
        value;
  }

  void write_row(int64_t r) {
    const int64_t h = head(r), s = query(r);
    const float factor = scratch_.m[r];
    const float* acc = scratch_.acc + r * panels_.padded();
    const HeadsOut& out = args_.out;
    const int64_t offset =
        block_.batch * out.batch_stride + h * out.head_stride + s * out.row_stride;
    with_dtype(p_.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      T* to = static_cast<T*>(out.data) + offset;
      for (int64_t d = 0; d < p_.head_dim; d += kLanes)
        store_partial(to + d, load(acc + d) * factor, p_.head_dim - d);
    });
  }

  const PrefixAttentionForward& args_;
  const PrefixAttentionParams& p_;
  const AttentionForwardBlock& block_;
  const int64_t group_, rows_, steps_;
  const HeadPanels panels_;
  const float scale_;  // of the scores, in base 2
  ForwardScratch<Operand> scratch_;
  const BatchKeys batch_;
  const int64_t position_;  // of the first query
  const KeyList list_;
  float block_sum_[kAttnRows];
};

inline int64_t attention_forward_scratch(const PrefixAttentionParams& p, int64_t queries) {
  const int64_t rows = queries * (p.q_heads / p.kv_heads);
  return with_operand(
      p, [&](auto operand) { return ForwardScratch<decltype(operand)>(p, rows, nullptr).bytes; });
}

inline void attention_forward_block(const PrefixAttentionForward& args,
                                    const AttentionForwardBlock& block, char* scratch) {
  with_operand(args.problem,
               [&](auto operand) { ForwardRows<decltype(operand)>(args, block, scratch).run(); });
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
