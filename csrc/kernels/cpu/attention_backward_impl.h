// Backward pass of prefix attention for queries of one key head.
//
//   P  = exp(scale q k^T - lse)           dv += drop(P)^T dout
//   dP = drop'(dout v^T)                  dS  = scale P (dP - rowsum(dout out))
//   dq  = dS k                            dk += dS^T q
//
// Everything is computed transposed, keys as rows: a tile of P^T then is at once the rows of A that
// dv and dk need, keys and values are read where they lie, and only dq^T needs keys transposed.
// A block of kBackwardQueries queries meets kBackwardKeys keys at a time; dk and dv are summed in
// float for all keys, in the order of the queries.
#include "kernels/cpu/attention_forward_impl.h"

namespace fused_peft::cpu::FUSED_PEFT_ISA {

constexpr int64_t kBackwardKeys = 96;
constexpr int64_t kDiagonalKeys = 16;  // of a step of dq where the number of queries changes
constexpr int64_t kColumns = kBackwardQueries;
static_assert(kBackwardKeys % kAttnRows == 0 && kBackwardKeys % kDiagonalKeys == 0);
static_assert(kColumns % kAttnCols == 0);

template <class Operand>
struct BackwardScratch {
  using Element = typename Operand::Element;
  float* q_columns;     // [panel of queries][D steps, kAttnCols]
  float* dout_columns;  // the same
  float* q_rows;        // [panel of D][query steps, vecs * kLanes]
  float* dout_rows;     // the same
  char* k_staged;       // [kBackwardKeys, D], the problem's dtype
  char* v_staged;       // the same
  Element* k;           // [kBackwardKeys, D], where the dtype is not the tile's
  Element* v;           // the same
  float* k_pairs;       // [key steps, padded D] interleaved
  float* k_transposed;  // [D, key steps]
  Element* weights;     // [kBackwardKeys, kColumns] P^T
  Element* ds;          // [kBackwardKeys, kColumns] dS^T
  float* ds_pairs;      // [key steps, kColumns] dS^T as rows of B
  float* scores;        // [kAttnRows, kAttnCols]
  float* dweights;      // [kAttnRows, kAttnCols]
  float* dq;            // [D, kColumns], transposed
  float* dq_rows;       // [kColumns, padded D]
  float* lse;           // [kColumns], base 2, inf where a query sees nothing
  float* lse_rest;      // [kColumns], what the float of it left over
  float* delta;         // [kColumns]
  int32_t* lo;          // [kColumns] first sequence key that a query sees, as place in the list
  int32_t* hi;          // [kColumns] last one + 1
  uint64_t* keep;       // [kColumns, kKeepWords] dropout
  int64_t bytes;

  static constexpr int64_t kKeepWords = (kBackwardKeys + 63) / 64 + 1;

  BackwardScratch(const PrefixAttentionParams& p, char* memory) {
    const HeadPanels panels(p.head_dim);
    const int64_t steps = (p.head_dim + Operand::kStep - 1) / Operand::kStep;
    const int64_t query_steps = kColumns / Operand::kStep;
    const int64_t key_steps = kBackwardKeys / Operand::kStep;
    ScratchPieces pieces(memory);
    q_columns = pieces.take<float>(kColumns * steps);
    dout_columns = pieces.take<float>(kColumns * steps);
    q_rows = pieces.take<float>(query_steps * panels.padded());
    dout_rows = pieces.take<float>(query_steps * panels.padded());
    k_staged = pieces.take<char>(kBackwardKeys * p.head_dim * 4);
    v_staged = pieces.take<char>(kBackwardKeys * p.head_dim * 4);
    k = pieces.take<Element>(kBackwardKeys * p.head_dim);
    v = pieces.take<Element>(kBackwardKeys * p.head_dim);
    k_pairs = pieces.take<float>(key_steps * panels.padded());
    k_transposed = pieces.take<float>((p.head_dim + kLanes) * key_steps);
    weights = pieces.take<Element>(kBackwardKeys * kColumns);
    ds = pieces.take<Element>(kBackwardKeys * kColumns);
    ds_pairs = pieces.take<float>(key_steps * kColumns);
    scores = pieces.take<float>(kAttnRows * kAttnCols);
    dweights = pieces.take<float>(kAttnRows * kAttnCols);
    dq = pieces.take<float>((p.head_dim + kLanes) * kColumns);
    dq_rows = pieces.take<float>(kColumns * panels.padded());
    lse = pieces.take<float>(kColumns);
    lse_rest = pieces.take<float>(kColumns);
    delta = pieces.take<float>(kColumns);
    lo = pieces.take<int32_t>(kColumns);
    hi = pieces.take<int32_t>(kColumns);
    keep = pieces.take<uint64_t>(kColumns * kKeepWords);
    bytes = pieces.used();
  }
};

template <class Operand>
class BackwardItems {
 public:
  using Element = typename Operand::Element;

  BackwardItems(const PrefixAttentionBackward& args, const AttentionBackwardBlock& block,
                char* memory)
      : args_(args),
        p_(args.problem),
        block_(block),
        size_(element_size(p_.dtype)),
        steps_((p_.head_dim + Operand::kStep - 1) / Operand::kStep),
        panels_(p_.head_dim),
        scale2_(static_cast<float>(p_.scale / kLog2)),
        scale_(static_cast<float>(p_.scale)),
        kept_(static_cast<float>(1.0 / (1.0 - p_.dropout_p))),
        scratch_(p_, memory),
        batch_(batch_keys(p_, block.batch)) {}

  void run() {
    const int64_t blocks = (p_.queries + kColumns - 1) / kColumns;
    for (int64_t item = block_.item0; item < block_.item1; ++item) {
      head_ = block_.kv_head * (p_.q_heads / p_.kv_heads) + item / blocks;
      s0_ = item % blocks * kColumns;
      queries_ = smaller(kColumns, p_.queries - s0_);
      run_item();
    }
  }

 private:
  const char* row_of(const HeadsView& view, int64_t s) const {
    return static_cast<const char*>(view.data) +
           (block_.batch * view.batch_stride + head_ * view.head_stride + s * view.row_stride) *
               size_;
  }

  void run_item() {
    prepare_queries();
    if (args_.dq.data)
      for (int64_t i = 0; i < p_.head_dim * kColumns; ++i) scratch_.dq[i] = 0.0F;
    const bool sequence = args_.dq.data || args_.dk.data || args_.dv.data;
    list_ = {p_.prefix, 0, sequence ? p_.prefix + larger(0, last_key_) : p_.prefix};
    for (int64_t u = 0; u < list_.count; u += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, list_.count - u);
      if (u >= list_.prefix && u + keys <= list_.prefix + first_key_) continue;
      run_keys(u, keys);
    }
    if (args_.dq.data) write_dq();
  }

  void prepare_queries() {
    const RowsOfKeys q{row_of(p_.q, s0_), p_.q.row_stride};
    const RowsOfKeys dout{row_of(args_.dout, s0_), args_.dout.row_stride};
    for (int64_t c = 0; c < queries_; c += kAttnCols) {
      const int64_t count = smaller(kAttnCols, queries_ - c);
      const auto at = [&](const RowsOfKeys& rows) {
        return RowsOfKeys{rows.data + c * rows.stride * size_, rows.stride};
      };
      pack_as_columns<Operand>(at(q), p_.dtype, count, p_.head_dim,
                               scratch_.q_columns + c * steps_);
      pack_as_columns<Operand>(at(dout), p_.dtype, count, p_.head_dim,
                               scratch_.dout_columns + c * steps_);
    }
    for (int panel = 0; panel < panels_.count; ++panel) {
      const int64_t first = panels_.first(panel);
      pack_as_rows<Operand>(q, p_.dtype, queries_, first, p_.head_dim - first,
                            panels_.vecs_of(panel), rows_panel(scratch_.q_rows, panel));
      pack_as_rows<Operand>(dout, p_.dtype, queries_, first, p_.head_dim - first,
                            panels_.vecs_of(panel), rows_panel(scratch_.dout_rows, panel));
    }
    prepare_columns();
  }

  float* rows_panel(float* packed, int panel) const {
    return packed + kColumns / Operand::kStep * panels_.first(panel);
  }

  void prepare_columns() {
    const int64_t position = first_position(p_, block_.batch) + s0_;
    first_key_ = batch_.range.hi;
    last_key_ = 0;
    columns_ = (queries_ + kLanes - 1) / kLanes * kLanes;
    for (int64_t c = 0; c < columns_; ++c) {
      const bool real = c < queries_;
      const KeyRange range = keys_of_query(p_, batch_.range, position + c);
      const bool any = real && range.hi > range.lo;
      scratch_.lo[c] = static_cast<int32_t>(any ? range.lo + p_.prefix : 0);
      scratch_.hi[c] = static_cast<int32_t>(any ? range.hi + p_.prefix : 0);
      if (any) {
        first_key_ = smaller(first_key_, range.lo);
        last_key_ = larger(last_key_, range.hi);
      }
      const double lse = real ? saved_lse(s0_ + c) : -__builtin_inf();
      const bool some = lse != -__builtin_inf();
      scratch_.lse[c] = some ? static_cast<float>(lse) : -kMinusInfinity;
      scratch_.lse_rest[c] = some ? static_cast<float>(lse - double{scratch_.lse[c]}) : 0.0F;
      scratch_.delta[c] = real ? row_product(s0_ + c) : 0.0F;
    }
  }

  // In base 2.
  double saved_lse(int64_t s) const {
    const int64_t i = (block_.batch * p_.q_heads + head_) * p_.queries + s;
    const double lse = p_.dtype == DType::kFloat32
                           ? static_cast<const double*>(args_.lse)[i]
                           : double{static_cast<const float*>(args_.lse)[i]};
    return lse / kLog2;
  }

  // dout . out of a query.
  float row_product(int64_t s) const {
    float sum = 0.0F;
    with_dtype(p_.dtype, [&](auto* type) {
      const auto* a = reinterpret_cast<decltype(type)>(row_of(args_.dout, s));
      const auto* b = reinterpret_cast<decltype(type)>(row_of(args_.out, s));
      Vec acc = {};
      for (int64_t d = 0; d < p_.head_dim; d += kLanes)
        acc += load_partial(a + d, p_.head_dim - d) * load_partial(b + d, p_.head_dim - d);
      sum = fold_lanes(acc, [](Vec x, Vec y) { return x + y; });
    });
    return sum;
  }

  // ---- a block of keys --------------------------------------------------------------------------

  struct KeyRows {
    const char* data;
    int64_t stride_bytes;
  };

  KeyRows key_rows(const HeadsView& prefix, const HeadsView& sequence, int64_t u, int64_t keys,
                   char* staged, Element* converted) {
    const RowsOfKeys rows = rows_of_keys(list_, prefix, sequence, block_.batch, block_.kv_head, u,
                                         keys, p_.head_dim, size_, staged);
    if (size_ == static_cast<int64_t>(sizeof(Element))) return {rows.data, rows.stride * size_};
    for (int64_t i = 0; i < keys; ++i)
      stage_row<Operand>(rows.data + i * rows.stride * size_, p_.dtype, p_.head_dim,
                         converted + i * p_.head_dim);
    return {reinterpret_cast<const char*>(converted),
            p_.head_dim * static_cast<int64_t>(sizeof(Element))};
  }

  void run_keys(int64_t u, int64_t keys) {
    const KeyRows k = key_rows(p_.prefix_k, p_.k, u, keys, scratch_.k_staged, scratch_.k);
    const KeyRows v = key_rows(p_.prefix_v, p_.v, u, keys, scratch_.v_staged, scratch_.v);
    if (p_.dropout_p > 0.0)
      for (int64_t c = 0; c < queries_; ++c)
        dropout_columns(p_, block_.dropout_threshold, list_, {block_.batch, head_, s0_ + c}, u,
                        keys, scratch_.keep + c * scratch_.kKeepWords);
    for (int64_t i = 0; i < keys; i += kAttnRows) {
      const int64_t rows = smaller(kAttnRows, keys - i);
      KeyRange& seen = seen_by_[i / kAttnRows];
      seen = columns_that_see(u + i, rows);
      if (args_.dq.data) clear_ds(i, rows, seen);
      if (seen.lo >= seen.hi) continue;
      for (int64_t c = seen.lo / kAttnCols * kAttnCols; c < seen.hi; c += kAttnCols)
        weigh_tile(k, v, u, i, rows, c, seen);
      if (block_.dk) add_to_keys(u, i, rows, seen);
    }
    if (args_.dq.data) add_to_queries(k, keys);
  }

  // Columns, in whole vectors, outside of which no query sees any of the keys.
  KeyRange columns_that_see(int64_t u, int64_t keys) const {
    if (u < list_.prefix) return {0, columns_};
    int64_t c0 = 0, c1 = columns_;
    // lo and hi do not fall from query to query, but for the empty ones.
    while (c0 < c1 && scratch_.hi[c0] <= u) ++c0;
    while (c1 > c0 && (scratch_.hi[c1 - 1] <= u || scratch_.lo[c1 - 1] >= u + keys)) --c1;
    return {c0 / kLanes * kLanes, (c1 + kLanes - 1) / kLanes * kLanes};
  }

  // What dq reads of the rows' dS outside of the columns that see them.
  void clear_ds(int64_t i, int64_t rows, const KeyRange& seen) {
    for (int64_t step = i / Operand::kStep; step * Operand::kStep < i + rows; ++step) {
      float* row = ds_pairs() + step * kColumns;
      for (int64_t c = 0; c < columns_; c += kLanes)
        if (c < seen.lo || c >= seen.hi) store(row + c, Vec{});
    }
  }

  float* ds_pairs() const {
    if constexpr (Operand::kStep == 1) return scratch_.ds;
    return scratch_.ds_pairs;
  }

  // P^T and dS^T of keys [i, i + rows) of the block and queries [c, c + kAttnCols).
  void weigh_tile(const KeyRows& k, const KeyRows& v, int64_t u, int64_t i, int64_t rows, int64_t c,
                  const KeyRange& seen) {
    const int64_t c0 = larger(c, seen.lo), c1 = smaller(c + kAttnCols, seen.hi);
    const auto vecs = static_cast<int>((c1 - c0) / kLanes);
    AttnTile tile{};
    tile.steps = steps_;
    tile.ldb = kAttnCols;
    tile.ldc = kAttnCols;
    tile.a = k.data + i * k.stride_bytes;
    tile.lda = k.stride_bytes;
    tile.b = scratch_.q_columns + c * steps_ + (c0 - c);
    tile.c = scratch_.scores;
    run_tile<Operand>(tile, static_cast<int>(rows), vecs);
    tile.a = v.data + i * v.stride_bytes;
    tile.lda = v.stride_bytes;
    tile.b = scratch_.dout_columns + c * steps_ + (c0 - c);
    tile.c = scratch_.dweights;
    run_tile<Operand>(tile, static_cast<int>(rows), vecs);
    const bool whole = all_see(u + i, rows, c0, c1);
    for (int64_t j = 0; j < rows; j += 2)
      for (int64_t x = c0; x < c1; x += kLanes) {
        const Vec first = gradient(u, i + j, j, x, c0, whole);
        const Vec second = j + 1 < rows ? gradient(u, i + j + 1, j + 1, x, c0, whole) : Vec{};
        if constexpr (Operand::kStep == 2)
          store_pairs(scratch_.ds_pairs + (i + j) / 2 * kColumns + x, first, second);
      }
  }

  bool all_see(int64_t u, int64_t rows, int64_t c0, int64_t c1) const {
    if (batch_.mask || c1 > queries_) return false;
    if (u + rows <= list_.prefix) return true;
    // Neither end falls from query to query; those that see nothing, with hi = 0, come first or
    // last.
    return scratch_.hi[c0] >= u + rows && scratch_.hi[c1 - 1] >= u + rows &&
           (u < list_.prefix ? scratch_.lo[c1 - 1] <= list_.prefix : scratch_.lo[c1 - 1] <= u);
  }

  // dS of a key and kLanes queries, stored with its weights; tile_row and x - c0 are the tile's.
  Vec gradient(int64_t u, int64_t row, int64_t tile_row, int64_t x, int64_t c0, bool whole) {
    const float* score = scratch_.scores + tile_row * kAttnCols + (x - c0);
    const float* dweight = scratch_.dweights + tile_row * kAttnCols + (x - c0);
    Vec exponent = load(score) * broadcast(scale2_) - load(scratch_.lse + x);
    if constexpr (Operand::kStep == 1) exponent -= load(scratch_.lse_rest + x);
    Vec weight = exp2_vec<Operand::kExpDegree>(exponent);
    if (!whole) weight = select(lanes_that_see(u + row, x), weight, Vec{});
    Vec dropped = weight, dw = load(dweight);
    if (p_.dropout_p > 0.0) {
      const VecI kept = kept_lanes(row, x);
      dropped = select(kept, weight * kept_, Vec{});
      dw = select(kept, dw * kept_, Vec{});
    }
    const Vec ds = weight * (dw - load(scratch_.delta + x)) * scale_;
    store(scratch_.weights + row * kColumns + x, dropped);
    store(scratch_.ds + row * kColumns + x, ds);
    return ds;
  }

  VecI lanes_that_see(int64_t u, int64_t x) const {
    const auto key = static_cast<int32_t>(u);
    const int64_t t = u - list_.prefix;
    if (t >= 0 && batch_.mask && !batch_.mask[t]) return VecI{};
    if (t < 0) return lane_indices() < static_cast<int32_t>(queries_ - x);
    return (load_bits<VecI>(scratch_.lo + x) <= key) & (load_bits<VecI>(scratch_.hi + x) > key);
  }

  VecI kept_lanes(int64_t row, int64_t x) const {
    VecI kept = {};
    for (int64_t l = 0; l < kLanes && x + l < queries_; ++l) {
      const uint64_t word = scratch_.keep[(x + l) * scratch_.kKeepWords + row / 64];
      kept[l] = word >> (row % 64) & 1U ? -1 : 0;
    }
    return kept;
  }

  static void store_pairs(float* to, Vec first, Vec second) {
#if FUSED_PEFT_BF16_DOT
    const auto half = [](Vec v) {
      return _mm512_cvtepu16_epi32(
          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
    };
    store_bits(to, _mm512_or_si512(half(first), _mm512_slli_epi32(half(second), 16)));
#else
    (void)to, (void)first, (void)second;
#endif
  }

  // dv and dk of keys [i, i + rows).
  void add_to_keys(int64_t u, int64_t i, int64_t rows, const KeyRange& seen) {
    for (int panel = 0; panel < panels_.count; ++panel) {
      AttnTile tile{};
      tile.lda = kColumns * static_cast<int64_t>(sizeof(Element));
      tile.ldb = int64_t{panels_.vecs_of(panel)} * kLanes;
      const int64_t skipped = seen.lo / Operand::kStep;
      tile.steps = (smaller(seen.hi, queries_) + Operand::kStep - 1) / Operand::kStep - skipped;
      tile.ldc = panels_.padded();
      tile.accumulate = true;
      const auto run = [&](const Element* a, float* b, float* sums) {
        tile.a = reinterpret_cast<const char*>(a + i * kColumns + seen.lo);
        tile.b = rows_panel(b, panel) + skipped * tile.ldb;
        tile.c = sums + (u + i) * panels_.padded() + panels_.first(panel);
        run_tile<Operand>(tile, static_cast<int>(rows), panels_.vecs_of(panel));
      };
      run(scratch_.weights, scratch_.dout_rows, block_.dv);
      run(scratch_.ds, scratch_.q_rows, block_.dk);
    }
  }

  // ---- dq ---------------------------------------------------------------------------------------

  // [D, key steps]: rows of A for dq^T = k^T dS^T.
  void transpose_keys(const KeyRows& k, int64_t keys) {
    const int64_t key_steps = kBackwardKeys / Operand::kStep;
    const auto* rows = reinterpret_cast<const Element*>(k.data);
    const int64_t stride = k.stride_bytes / static_cast<int64_t>(sizeof(Element));
    if constexpr (Operand::kStep == 1) {
      transpose(rows, stride, keys, p_.head_dim, scratch_.k_transposed, key_steps);
    } else {
#if FUSED_PEFT_BF16_DOT
      const auto vecs = static_cast<int>((p_.head_dim + kLanes - 1) / kLanes);
      pack_rows_pairs(rows, stride, keys, p_.head_dim, vecs, scratch_.k_pairs);
      transpose(scratch_.k_pairs, int64_t{vecs} * kLanes, (keys + 1) / 2, p_.head_dim,
                scratch_.k_transposed, key_steps);
#endif
    }
  }

  void add_to_queries(const KeyRows& k, int64_t keys) {
    transpose_keys(k, keys);
    int64_t i = 0;
    while (i < keys) {
      // As many keys as the same columns see, else a short step of them.
      KeyRange seen = seen_by_[i / kAttnRows];
      int64_t end = smaller(keys, i + kDiagonalKeys);
      for (int64_t j = i; j < end; j += kAttnRows) widen(seen, seen_by_[j / kAttnRows]);
      widen(seen, seen_by_[(end - 1) / kAttnRows]);
      while (end < keys) {
        const int64_t next = smaller(keys, end + kDiagonalKeys);
        if (!same(seen, seen_by_[end / kAttnRows]) || !same(seen, seen_by_[(next - 1) / kAttnRows]))
          break;
        end = next;
      }
      if (seen.lo < seen.hi) add_keys_to_queries(i, end, seen);
      i = end;
    }
  }

  static bool same(const KeyRange& a, const KeyRange& b) { return a.lo == b.lo && a.hi == b.hi; }
  static void widen(KeyRange& range, const KeyRange& other) {
    if (other.lo >= other.hi) return;
    if (range.lo >= range.hi) {
      range = other;
      return;
    }
    range = {smaller(range.lo, other.lo), larger(range.hi, other.hi)};
  }

  void add_keys_to_queries(int64_t i0, int64_t i1, const KeyRange& seen) {
    AttnTile tile{};
    const int64_t key_steps = kBackwardKeys / Operand::kStep;
    tile.lda = key_steps * 4;
    tile.ldb = kColumns;
    tile.ldc = kColumns;
    tile.steps = (i1 - i0 + Operand::kStep - 1) / Operand::kStep;
    tile.accumulate = true;
    for (int64_t c = seen.lo; c < seen.hi; c += kAttnCols) {
      const auto vecs = static_cast<int>(smaller(kAttnVecs, (seen.hi - c) / kLanes));
      tile.b = ds_pairs() + i0 / Operand::kStep * kColumns + c;
      for (int64_t d = 0; d < p_.head_dim; d += kAttnRows) {
        tile.a = reinterpret_cast<const char*>(scratch_.k_transposed + d * key_steps +
                                               i0 / Operand::kStep);
        tile.c = scratch_.dq + d * kColumns + c;
        run_tile<Operand>(tile, static_cast<int>(smaller(kAttnRows, p_.head_dim - d)), vecs);
      }
    }
  }

  void write_dq() {
    transpose(scratch_.dq, kColumns, p_.head_dim, queries_, scratch_.dq_rows, panels_.padded());
    const HeadsOut& dq = args_.dq;
    with_dtype(p_.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      for (int64_t c = 0; c < queries_; ++c) {
        T* to = static_cast<T*>(dq.data) + block_.batch * dq.batch_stride + head_ * dq.head_stride +
                (s0_ + c) * dq.row_stride;
        for (int64_t d = 0; d < p_.head_dim; d += kLanes)
          store_partial(to + d,
                        load_partial(scratch_.dq_rows + c * panels_.padded() + d, p_.head_dim - d),
                        p_.head_dim - d);
      }
    });
  }

  const PrefixAttentionBackward& args_;
  const PrefixAttentionParams& p_;
  const AttentionBackwardBlock& block_;
  const int64_t size_, steps_;
  const HeadPanels panels_;
  const float scale2_;  // of the scores, in base 2
  const float scale_;
  const float kept_;  // 1 / (1 - dropout_p)
  BackwardScratch<Operand> scratch_;
  const BatchKeys batch_;

  int64_t head_ = 0, s0_ = 0, queries_ = 0;  // the item
  int64_t columns_ = 0;                      // queries_ in whole vectors
  int64_t first_key_ = 0, last_key_ = 0;     // sequence keys that its queries see
  KeyList list_;
  KeyRange seen_by_[kBackwardKeys / kAttnRows + 1] = {};
};

inline int64_t attention_padded_head_dim(const PrefixAttentionParams& p) {
  return HeadPanels(p.head_dim).padded();
}

inline int64_t attention_backward_scratch(const PrefixAttentionParams& p) {
  return with_operand(
      p, [&](auto operand) { return BackwardScratch<decltype(operand)>(p, nullptr).bytes; });
}

inline void attention_backward_block(const PrefixAttentionBackward& args,
                                     const AttentionBackwardBlock& block, char* scratch) {
  with_operand(args.problem,
               [&](auto operand) { BackwardItems<decltype(operand)>(args, block, scratch).run(); });
}

}  // namespace fused_peft::cpu::FUSED_PEFT_ISA
