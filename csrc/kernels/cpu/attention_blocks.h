// Blocks of prefix attention that an instruction set's file computes and prefix_attention.cpp
// spreads over threads.
#pragma once

#include <cstdint>

#include "kernels/prefix_attention.h"

namespace fused_peft::cpu {

// Queries [s0, s1) of every head that shares key head kv_head.
struct AttentionForwardBlock {
  int64_t batch, kv_head;
  int64_t s0, s1;
  uint32_t dropout_threshold;
};

// Items [item0, item1) of one key head's list of (query head of the group, block of
// kBackwardQueries queries), and the sums of dk and dv over them, in float.
struct AttentionBackwardBlock {
  int64_t batch, kv_head;
  int64_t item0, item1;
  float* dk;  // [P + T, padded head_dim], zero at first; null where no key's gradient is asked for
  float* dv;
  uint32_t dropout_threshold;
};

constexpr int64_t kBackwardQueries = 128;  // of an item

}  // namespace fused_peft::cpu
