// The first tokens of a fresh row: exact attention of every head, and the probabilities that decide its map.
#pragma once

#include "chai/head_map.h"
#include "kernels.h"
#include "stream_kernel.h"

namespace chai {
namespace CHAI_ISA {

// The map compares probabilities between implementations, so the exponential is the C library's.
CHAI_INLINE void probabilities(float* scores, std::int64_t n) {
  float best = scores[0];
  for (std::int64_t i = 1; i < n; ++i) best = scores[i] > best ? scores[i] : best;
  float total = 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    scores[i] = __builtin_expf(scores[i] - best);
    total += scores[i];
  }
  for (std::int64_t i = 0; i < n; ++i) scores[i] /= total;
}

inline std::size_t probe_scratch(const ProbeTask& task) {
  return task.tokens + task.key_dim + task.value_dim;
}

template <typename T>
void probe(const ProbeTask& task, float* memory) {
  float* scores = memory;
  float* query = scores + task.tokens;
  float* sums = query + task.key_dim;
  std::int32_t* quantised_row = task.quantised;
  for (std::int64_t token = 0; token < task.tokens; ++token) {
    const std::int64_t visible = token + 1;
    widen(query, static_cast<const T*>(task.query) + token * task.key_dim, task.key_dim, 1.0f);
    dots_of_one(query, static_cast<const T*>(task.key), visible, task.key_dim, scores);
    for (std::int64_t i = 0; i < visible; ++i) scores[i] *= task.scale;
    probabilities(scores, visible);
    quantise(scores, visible, quantised_row);
    quantised_row += visible;
    __builtin_memset(sums, 0, task.value_dim * sizeof(float));
    weighted_sum(sums, static_cast<const T*>(task.value), scores, visible, task.value_dim);
    narrow(static_cast<T*>(task.output) + token * task.output_stride, sums, task.value_dim, 1.0f);
  }
}

}  // namespace CHAI_ISA
}  // namespace chai
