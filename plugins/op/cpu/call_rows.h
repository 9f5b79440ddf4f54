// The active rows of a call, and where their keys and values lie.
#pragma once

#include <cstdint>
#include <vector>

#include "chai/attention.h"
#include "chai/head_map.h"
#include "op/cpu/rows.h"

namespace chai {

// One active row (lengths > 0).
struct Row {
  std::int64_t index = 0;       // b
  std::int64_t past = 0;        // n
  std::int64_t new_tokens = 0;  // m
  bool fresh = false;
  std::int64_t exact = 0;  // the first tokens, which the probe computes
  std::vector<std::int32_t> head_map;
  Slots slots;

  std::int64_t tokens() const { return new_tokens - exact; }  // computed by representative
  std::int64_t position() const { return past + exact; }      // of the first of them
  std::int64_t end() const { return past + new_tokens; }
};

std::vector<Row> active_rows(const AttentionCall& call);

// Rows of head `head` of `heads` in a pool, by the page table of `row`.
PagedRows paged_rows(const AttentionCall& call, const Pool& pool, std::int64_t heads, std::int64_t dim,
                     std::int64_t head, std::int64_t row);

// Keys of a KV head that has a slot, and values of any.
PagedRows keys_of(const AttentionCall& call, const Row& row, std::int64_t kv_head);
PagedRows values_of(const AttentionCall& call, const Row& row, std::int64_t kv_head);

// Start of the rows of matrix `index` in a contiguous tensor [matrices][tokens][dim] of T.
const char* activations(const AttentionCall& call, const void* tensor, std::int64_t index,
                        std::int64_t tokens, std::int64_t dim);

// Natural-unit factor on the scores of a call.
float score_scale(const AttentionCall& call);

// The sink of a query head in natural units, -inf without one.
float sink_of(const AttentionCall& call, std::int64_t head);

}  // namespace chai
