// Drivers of prefix attention: how its blocks are spread over threads, and the sums over what more
// than one thread contributes to. The blocks themselves are in the instruction sets' files.
#include "kernels/prefix_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/isa.h"

namespace fused_peft::cpu {
namespace {

bool covered(const PrefixAttentionParams& p, Isa isa) {
  constexpr int64_t kLargest = int64_t{1} << 30;  // places of keys are int32 inside the kernels
  return isa_available(isa) && p.batch >= 0 && p.queries >= 0 && p.keys >= 0 && p.prefix >= 0 &&
         p.head_dim >= 1 && p.head_dim <= kMaxHeadDim && p.kv_heads >= 1 &&
         p.q_heads % p.kv_heads == 0 && p.keys + p.prefix < kLargest && p.scale > 0.0;
}

// ---- forward -----------------------------------------------------------------------------------

// (query, head) rows of a task: enough to hide the packing of keys behind them, few enough to
// balance, and their float sums stay in the L2 cache.
constexpr int64_t kTaskRows = 384;
constexpr int64_t kLeastTaskRows = 96;

int64_t queries_of_task(const PrefixAttentionParams& p, int threads) {
  const int64_t group = p.q_heads / p.kv_heads;
  int64_t queries = std::max<int64_t>(1, kTaskRows / group);
  const int64_t least = std::max<int64_t>(1, kLeastTaskRows / group);
  while (queries / 2 >= least &&
         p.batch * p.kv_heads * ceil_div(p.queries, queries) < int64_t{4} * threads)
    queries /= 2;
  return std::min(queries, p.queries);
}

// ---- backward ----------------------------------------------------------------------------------

// Pairs (query head of a group, block of queries) of one key head.
int64_t items_of_head(const PrefixAttentionParams& p) {
  return p.q_heads / p.kv_heads * ceil_div(p.queries, kBackwardQueries);
}

// Key-query pairs of an item, roughly: what it costs.
int64_t cost_of_item(const PrefixAttentionParams& p, int64_t batch, int64_t item) {
  const int64_t blocks = ceil_div(p.queries, kBackwardQueries);
  const int64_t s0 = item % blocks * kBackwardQueries;
  const int64_t queries = std::min(kBackwardQueries, p.queries - s0);
  int64_t keys = p.key_lengths ? std::clamp<int64_t>(p.key_lengths[batch], 0, p.keys) : p.keys;
  if (p.causal) {
    const int64_t start =
        p.query_start ? p.query_start[batch * p.query_start_stride] : p.keys - p.queries;
    keys = std::clamp<int64_t>(start + s0 + queries / 2, 0, keys);
  }
  if (p.window > 0) keys = std::min(keys, p.causal ? p.window : 2 * p.window);
  return (p.prefix + keys + kBackwardQueries / 2) * queries;
}

struct HeadSums {
  float* dk;  // [P + T, padded head_dim]
  float* dv;
};

class Backward {
 public:
  Backward(const PrefixAttentionBackward& args, Isa isa, const ParallelFor& parallel)
      : args_(args),
        p_(args.problem),
        table_(kernel_table(isa)),
        parallel_(parallel),
        padded_(table_.attention_padded_head_dim(p_)),
        sums_size_((p_.prefix + p_.keys) * padded_),
        items_(items_of_head(p_)),
        heads_(p_.batch * p_.kv_heads),
        keys_wanted_(args.dk.data || args.dv.data || args.dprefix_k.data || args.dprefix_v.data),
        sums_prefixes_(p_.shared_prefix && p_.batch > 1) {}

  Status run() {
    std::vector<int64_t> bounds = split();
    const int64_t workers = static_cast<int64_t>(bounds.size()) - 1;
    // A worker sums one head at a time; the first and the last of its heads it may share.
    if (keys_wanted_) {
      sums_ = allocate<float>(workers * 3 * 2 * sums_size_);
      if (!sums_) return Status::kOutOfMemory;
      if (sums_prefixes_) {
        prefix_sums_ = allocate<float>(heads_ * 2 * p_.prefix * p_.head_dim);
        if (!prefix_sums_) return Status::kOutOfMemory;
      }
    }
    const auto work = [&](int64_t worker, char* scratch) {
      run_worker(worker, bounds[static_cast<size_t>(worker)],
                 bounds[static_cast<size_t>(worker) + 1], scratch);
    };
    if (!for_each_task(table_.attention_backward_scratch(p_), parallel_, workers, work))
      return Status::kOutOfMemory;
    if (keys_wanted_) add_shared_heads(bounds);
    if (prefix_sums_) add_prefixes();
    return Status::kOk;
  }

 private:
  // Bounds of the workers' contiguous ranges of items, equal in cost. They depend on the number of
  // threads, and so do the sums; nothing depends on which thread is faster.
  std::vector<int64_t> split() const {
    const int64_t total_items = heads_ * items_;
    double total = 0.0;
    for (int64_t i = 0; i < total_items; ++i) total += cost(i);
    const int64_t workers = std::min<int64_t>(parallel_.num_threads, total_items);
    std::vector<int64_t> bounds{0};
    double sum = 0.0;
    for (int64_t i = 0; i < total_items; ++i) {
      const auto next = static_cast<double>(bounds.size());
      if (next < static_cast<double>(workers) &&
          sum + cost(i) / 2 >= total * next / static_cast<double>(workers) && i > bounds.back())
        bounds.push_back(i);
      sum += cost(i);
    }
    bounds.push_back(total_items);
    return bounds;
  }

  double cost(int64_t i) const {
    return static_cast<double>(cost_of_item(p_, i / items_ / p_.kv_heads, i % items_));
  }

  HeadSums slot(int64_t worker, int64_t which) const {
    if (!keys_wanted_) return {nullptr, nullptr};
    float* first = sums_.get() + (worker * 3 + which) * 2 * sums_size_;
    return {first, first + sums_size_};
  }

  // Slot of a worker's sums of a head: 0 and 1 for a head shared with an earlier or a later worker.
  static constexpr int64_t kEarlier = 0, kLater = 1, kWhole = 2;
  int64_t slot_of(int64_t head, int64_t item0, int64_t item1) const {
    if (item0 > head * items_) return kEarlier;
    return item1 < (head + 1) * items_ ? kLater : kWhole;
  }

  void run_worker(int64_t worker, int64_t item0, int64_t item1, char* scratch) {
    for (int64_t head = item0 / items_; head * items_ < item1; ++head) {
      const int64_t which = slot_of(head, item0, item1);
      const HeadSums sums = slot(worker, which);
      if (keys_wanted_) {
        std::memset(sums.dk, 0, static_cast<size_t>(sums_size_) * sizeof(float));
        std::memset(sums.dv, 0, static_cast<size_t>(sums_size_) * sizeof(float));
      }
      const AttentionBackwardBlock block{head / p_.kv_heads,
                                         head % p_.kv_heads,
                                         std::max(item0, head * items_) - head * items_,
                                         std::min(item1, (head + 1) * items_) - head * items_,
                                         sums.dk,
                                         sums.dv,
                                         dropout_threshold(p_.dropout_p)};
      table_.attention_backward_block(args_, block, scratch);
      if (keys_wanted_ && which == kWhole) write_head(head, sums);
    }
  }

  // Heads that several workers have a part of: their sums in the order of the workers.
  void add_shared_heads(const std::vector<int64_t>& bounds) {
    const auto workers = static_cast<int64_t>(bounds.size()) - 1;
    for (int64_t w = 0; w < workers;) {
      const int64_t end = bounds[static_cast<size_t>(w) + 1];
      const int64_t head = end / items_;
      ++w;
      if (end % items_ == 0) continue;
      const HeadSums sums = slot(w - 1, slot_of(head, bounds[static_cast<size_t>(w) - 1], end));
      for (; w < workers && bounds[static_cast<size_t>(w)] < (head + 1) * items_; ++w) {
        const HeadSums other = slot(w, kEarlier);
        for (int64_t i = 0; i < sums_size_; ++i) {
          sums.dk[i] += other.dk[i];
          sums.dv[i] += other.dv[i];
        }
        if (bounds[static_cast<size_t>(w) + 1] >= (head + 1) * items_) break;
      }
      write_head(head, sums);
    }
  }

  void write_head(int64_t head, const HeadSums& sums) {
    const int64_t b = head / p_.kv_heads, h = head % p_.kv_heads;
    write(args_.dk, b, h, sums.dk + p_.prefix * padded_, p_.keys);
    write(args_.dv, b, h, sums.dv + p_.prefix * padded_, p_.keys);
    if (!prefix_sums_) {
      write(args_.dprefix_k, b, h, sums.dk, p_.prefix);
      write(args_.dprefix_v, b, h, sums.dv, p_.prefix);
      return;
    }
    float* to = prefix_sums_.get() + head * 2 * p_.prefix * p_.head_dim;
    for (const float* from : {sums.dk, sums.dv})
      for (int64_t i = 0; i < p_.prefix; ++i, to += p_.head_dim)
        std::memcpy(to, from + i * padded_, static_cast<size_t>(p_.head_dim) * sizeof(float));
  }

  void write(const HeadsOut& out, int64_t b, int64_t h, const float* rows, int64_t count) const {
    if (!out.data) return;
    char* to = static_cast<char*>(out.data) +
               (b * out.batch_stride + h * out.head_stride) * element_size(p_.dtype);
    table_.from_float(rows, padded_, count, p_.head_dim, to, out.row_stride, p_.dtype);
  }

  // The gradient of a prefix that the batch shares: the sum over the batch, row 0 first.
  void add_prefixes() {
    const int64_t size = 2 * p_.prefix * p_.head_dim;
    for (int64_t h = 0; h < p_.kv_heads; ++h) {
      float* sum = prefix_sums_.get() + h * size;
      for (int64_t b = 1; b < p_.batch; ++b) {
        const float* other = prefix_sums_.get() + (b * p_.kv_heads + h) * size;
        for (int64_t i = 0; i < size; ++i) sum[i] += other[i];
      }
      const auto write_sum = [&](const HeadsOut& out, const float* rows) {
        if (!out.data) return;
        char* to = static_cast<char*>(out.data) + h * out.head_stride * element_size(p_.dtype);
        table_.from_float(rows, p_.head_dim, p_.prefix, p_.head_dim, to, out.row_stride, p_.dtype);
      };
      write_sum(args_.dprefix_k, sum);
      write_sum(args_.dprefix_v, sum + size / 2);
    }
  }

  const PrefixAttentionBackward& args_;
  const PrefixAttentionParams& p_;
  const KernelTable& table_;
  const ParallelFor& parallel_;
  const int64_t padded_, sums_size_, items_, heads_;
  const bool keys_wanted_, sums_prefixes_;
  Buffer<float> sums_;         // [worker, kEarlier kLater kWhole, dk dv, P + T, padded head_dim]
  Buffer<float> prefix_sums_;  // [B, Hkv, dk dv, P, D]
};

void zero(const HeadsOut& out, int64_t batch, int64_t heads, int64_t length,
          const PrefixAttentionParams& p) {
  if (!out.data) return;
  const int64_t size = element_size(p.dtype);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < length; ++i)
        std::memset(static_cast<char*>(out.data) +
                        (b * out.batch_stride + h * out.head_stride + i * out.row_stride) * size,
                    0, static_cast<size_t>(p.head_dim * size));
}

// Gradients of a problem without a query.
void zero_gradients(const PrefixAttentionBackward& args) {
  const PrefixAttentionParams& p = args.problem;
  const int64_t prefixes = p.shared_prefix ? 1 : p.batch;
  zero(args.dk, p.batch, p.kv_heads, p.keys, p);
  zero(args.dv, p.batch, p.kv_heads, p.keys, p);
  zero(args.dprefix_k, prefixes, p.kv_heads, p.prefix, p);
  zero(args.dprefix_v, prefixes, p.kv_heads, p.prefix, p);
}

}  // namespace

Status prefix_attention_forward(const PrefixAttentionForward& args, Isa isa,
                                const ParallelFor& parallel) {
  const PrefixAttentionParams& p = args.problem;
  if (!covered(p, isa)) return Status::kUnsupported;
  if (p.batch == 0 || p.queries == 0) return Status::kOk;
  const KernelTable& table = kernel_table(isa);
  const int64_t queries = queries_of_task(p, parallel.num_threads);
  const int64_t chunks = ceil_div(p.queries, queries), heads = p.batch * p.kv_heads;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, char* scratch) {
    for (int64_t task = next++; task < chunks * heads; task = next++) {
      // The last queries first: under a causal mask they take longest.
      const int64_t s0 = (chunks - 1 - task / heads) * queries;
      const int64_t head = task % heads;
      const AttentionForwardBlock block{head / p.kv_heads, head % p.kv_heads, s0,
                                        std::min(p.queries, s0 + queries),
                                        dropout_threshold(p.dropout_p)};
      table.attention_forward_block(args, block, scratch);
    }
  };
  const int64_t bytes = table.attention_forward_scratch(p, queries);
  const bool done = for_each_task(bytes, parallel, parallel.num_threads, work);
  return done ? Status::kOk : Status::kOutOfMemory;
}

Status prefix_attention_backward(const PrefixAttentionBackward& args, Isa isa,
                                 const ParallelFor& parallel) {
  const PrefixAttentionParams& p = args.problem;
  if (!covered(p, isa)) return Status::kUnsupported;
  if (p.batch == 0 || p.queries == 0) {
    zero_gradients(args);
    return Status::kOk;
  }
  return Backward(args, isa, parallel).run();
}

}  // namespace fused_peft::cpu
