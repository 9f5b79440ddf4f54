// The first tokens of a fresh row: exact attention of every head, and the probabilities that decide its map.
#pragma once

#include "chai/head_map.h"
#include "op/cpu/float_rows.h"
#include "op/cpu/kernels.h"

namespace chai {
namespace CHAI_ISA {

// The map compares probabilities between implementations, so the exponential is the C library's. Without a
// sink `sink` is -inf.
CHAI_INLINE void probabilities(float* scores, std::int64_t n, float sink) {
  float best = sink;
  for (std::int64_t i = 0; i < n; ++i) best = scores[i] > best ? scores[i] : best;
  float total = sink > -HUGE_VALF ? __builtin_expf(sink - best) : 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    scores[i] = __builtin_expf(scores[i] - best);
    total += scores[i];
  }
  for (std::int64_t i = 0; i < n; ++i) scores[i] /= total;
}

struct ProbeScratch {
  float* scores;  // [tokens]
  float* query;   // [key_dim]
  float* sums;    // [value_dim]
  float* keys;    // [tokens][key_dim]
  float* values;  // [tokens][value_dim]

  ProbeScratch(const ProbeTask& task, float* memory) {
    scores = memory;
    query = scores + task.tokens;
    sums = query + task.common->key_dim;
    keys = sums + task.common->value_dim;
    values = keys + task.tokens * task.common->key_dim;
  }

  static std::size_t size(const ProbeTask& task) {
    return task.tokens + (task.tokens + 1) * (task.common->key_dim + task.common->value_dim);
  }
};

inline void probe(const ProbeTask& task, float* memory) {
  const Common& common = *task.common;
  const ElementKernels& element = *common.element;
  const ProbeScratch scratch(task, memory);
  element.widen(scratch.keys, task.key, task.tokens * common.key_dim, 1.0f);
  element.widen(scratch.values, task.value, task.tokens * common.value_dim, 1.0f);
  std::int32_t* quantised_row = task.quantised;
  for (std::int64_t token = 0; token < task.tokens; ++token) {
    const std::int64_t visible = token + 1;
    const std::int64_t first = common.window > 0 ? most(0, visible - common.window) : 0;
    const auto* query = static_cast<const char*>(task.query) + token * common.key_dim * element.size;
    element.widen(scratch.query, query, common.key_dim, 1.0f);
    dots_of_one(scratch.query, scratch.keys, visible, common.key_dim, scratch.scores);
    for (std::int64_t i = first; i < visible; ++i) {
      float score = scratch.scores[i] * task.scale;
      if (task.softcap != 0.0f) score = task.softcap * __builtin_tanhf(score / task.softcap);
      scratch.scores[i] = score + task.slope * static_cast<float>(i - token);
    }
    for (std::int64_t i = 0; i < first; ++i) scratch.scores[i] = -HUGE_VALF;
    probabilities(scratch.scores, visible, task.sink);
    quantise(scratch.scores, visible, quantised_row);
    quantised_row += visible;
    __builtin_memset(scratch.sums, 0, common.value_dim * sizeof(float));
    weighted_sum(scratch.sums, scratch.values, scratch.scores, visible, common.value_dim);
    auto* to = static_cast<char*>(task.output) + token * common.output_stride * element.size;
    element.narrow(to, scratch.sums, common.value_dim, 1.0f);
  }
}

}  // namespace CHAI_ISA
}  // namespace chai
