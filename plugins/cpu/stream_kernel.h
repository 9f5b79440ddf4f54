// Decode: a few tokens against a long cache. Bound by memory, so every K and V row is read once, in order.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace chai {
namespace CHAI_ISA {

constexpr int kDotRows = 4;               // rows of K per step of a dot product
constexpr int kSumRows = 8;               // rows of V per step of a weighted sum
constexpr std::int64_t kSharedRows = 32;  // rows of V that stay in L1 while several heads weigh them

// scores[q][r] = queries[q] · keys[r] for kDotRows consecutive rows.
template <int QUERIES, typename T>
CHAI_INLINE void dot_rows(const float* queries, std::int64_t query_stride, const T* keys, std::int64_t dim,
                          float* scores, std::int64_t score_stride) {
  Vec sum_of[QUERIES][kDotRows] = {};
  std::int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec k[kDotRows];
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) k[r] = load(keys + r * dim + d);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const Vec x = load(queries + q * query_stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < kDotRows; ++r) sum_of[q][r] += x * k[r];
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q) {
    Quad total = sums(sum_of[q][0], sum_of[q][1], sum_of[q][2], sum_of[q][3]);
    for (std::int64_t tail = d; tail < dim; ++tail) {
      const float x = queries[q * query_stride + tail];
      for (int r = 0; r < kDotRows; ++r) total[r] += x * load_one(keys + r * dim + tail);
    }
    __builtin_memcpy(scores + q * score_stride, &total, sizeof(total));
  }
}

template <typename T>
CHAI_INLINE float dot_one(const float* query, const T* key, std::int64_t dim) {
  Vec total = {};
  std::int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) total += load(query + d) * load(key + d);
  float result = sum(total);
  for (; d < dim; ++d) result += query[d] * load_one(key + d);
  return result;
}

// scores[q][t] = queries[q] · keys[t]
template <int QUERIES, typename T>
void dots(const float* queries, const T* keys, std::int64_t rows, std::int64_t dim, float* scores,
          std::int64_t score_stride) {
  std::int64_t t = 0;
  for (; t + kDotRows <= rows; t += kDotRows) {
    dot_rows<QUERIES>(queries, dim, keys + t * dim, dim, scores + t, score_stride);
  }
  for (; t < rows; ++t) {
    for (int q = 0; q < QUERIES; ++q) {
      scores[q * score_stride + t] = dot_one(queries + q * dim, keys + t * dim, dim);
    }
  }
}

template <typename T>
void dots(const float* queries, std::int64_t num_queries, const T* keys, std::int64_t rows, std::int64_t dim,
          float* scores, std::int64_t score_stride) {
  // Blocks of rows stay in L1 while further queries of the same slot use them.
  for (std::int64_t t = 0; t < rows; t += kSharedRows) {
    const std::int64_t n = num_queries > 2 ? least(kSharedRows, rows - t) : rows;
    std::int64_t q = 0;
    for (; q + 2 <= num_queries; q += 2) {
      dots<2>(queries + q * dim, keys + t * dim, n, dim, scores + q * score_stride + t, score_stride);
    }
    if (q < num_queries) {
      dots<1>(queries + q * dim, keys + t * dim, n, dim, scores + q * score_stride + t, score_stride);
    }
    if (n == rows) break;
  }
}

// Scores become exp2(score - max); returns max and sum.
CHAI_INLINE SoftmaxState soften(float* scores, std::int64_t n) {
  Vec best = splat(-FLT_MAX);
  std::int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) best = larger(load(scores + t), best);
  SoftmaxState state;
  state.max = largest(best);
  for (; t < n; ++t) state.max = scores[t] > state.max ? scores[t] : state.max;
  Vec total = {};
  for (t = 0; t + kLanes <= n; t += kLanes) {
    const Vec weight = exp2_nonpositive(load(scores + t) - state.max);
    store(scores + t, weight);
    total += weight;
  }
  state.sum = sum(total);
  for (; t < n; ++t) {
    scores[t] = exp2_nonpositive(splat(scores[t] - state.max))[0];
    state.sum += scores[t];
  }
  return state;
}

// out[v] += sum over ROWS rows of weight * values.
template <int ROWS, typename T>
CHAI_INLINE void add_rows(float* out, const T* values, const float* weights, std::int64_t dim) {
  Vec weight[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) weight[r] = splat(weights[r]);
  std::int64_t v = 0;
  for (; v + kLanes <= dim; v += kLanes) {
    Vec total = load(out + v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) total += weight[r] * load(values + r * dim + v);
    store(out + v, total);
  }
  for (; v < dim; ++v) {
    for (int r = 0; r < ROWS; ++r) out[v] += weights[r] * load_one(values + r * dim + v);
  }
}

template <typename T>
CHAI_INLINE void weighted_sum(float* out, const T* values, const float* weights, std::int64_t rows,
                              std::int64_t dim) {
  std::int64_t t = 0;
  for (; t + kSumRows <= rows; t += kSumRows) add_rows<kSumRows>(out, values + t * dim, weights + t, dim);
  for (; t < rows; ++t) add_rows<1>(out, values + t * dim, weights + t, dim);
}

struct StreamScratch {
  float* scores;         // [queries][score_stride]
  float* queries;        // [queries][key_dim], scaled
  SoftmaxState* states;  // [queries]
  float* sums;           // [heads of one KV head][value_dim]
  std::int64_t score_stride;

  StreamScratch(const StreamTask& task, float* memory) : score_stride(round_up(task.end - task.begin, 16)) {
    scores = memory;
    queries = scores + task.num_queries * score_stride;
    states = reinterpret_cast<SoftmaxState*>(queries + task.num_queries * task.key_dim);
    sums = reinterpret_cast<float*>(states + task.num_queries);
  }

  static std::size_t size(const StreamTask& task) {
    std::int64_t heads = 1;
    for (std::int64_t i = 0; i < task.num_values; ++i) heads = most(heads, task.values[i].num_heads);
    const std::int64_t per_query = round_up(task.end - task.begin, 16) + task.key_dim + 2;
    return task.num_queries * per_query + heads * task.value_dim;
  }
};

// Weights of all representatives of the component for one token that sees `rows` positions of the range.
template <typename T>
void stream_scores(const StreamTask& task, std::int64_t token, std::int64_t rows,
                   const StreamScratch& scratch) {
  for (std::int64_t i = 0; i < task.num_queries; ++i) {
    const T* query = static_cast<const T*>(task.queries[i]) + token * task.key_dim;
    widen(scratch.queries + i * task.key_dim, query, task.key_dim, task.scale);
  }
  for (std::int64_t i = 0; i < task.num_slots; ++i) {
    const StreamTask::Slot& slot = task.slots[i];
    dots(scratch.queries + slot.first_query * task.key_dim, slot.num_queries,
         static_cast<const T*>(slot.keys) + task.begin * task.key_dim, rows, task.key_dim,
         scratch.scores + slot.first_query * scratch.score_stride, scratch.score_stride);
  }
  for (std::int64_t i = 0; i < task.num_queries; ++i) {
    scratch.states[i] = soften(scratch.scores + i * scratch.score_stride, rows);
  }
}

// All query heads of one KV head, for one token.
template <typename T>
void stream_value(const StreamTask& task, const StreamTask::Value& value, std::int64_t token,
                  std::int64_t rows, const StreamScratch& scratch) {
  const T* values = static_cast<const T*>(value.values) + task.begin * task.value_dim;
  const StreamTask::Head* heads = task.heads + value.first_head;
  const auto sums_of = [&](std::int64_t i) {
    float* partial = heads[i].target.partial;
    return partial ? partial + (task.part_offset + token) * task.value_dim
                   : scratch.sums + i * task.value_dim;
  };
  for (std::int64_t i = 0; i < value.num_heads; ++i) {
    __builtin_memset(sums_of(i), 0, task.value_dim * sizeof(float));
  }
  const std::int64_t step = value.num_heads > 1 ? kSharedRows : rows;
  for (std::int64_t t = 0; t < rows; t += step) {
    for (std::int64_t i = 0; i < value.num_heads; ++i) {
      const float* weights = scratch.scores + heads[i].query * scratch.score_stride + t;
      weighted_sum(sums_of(i), values + t * task.value_dim, weights, least(step, rows - t), task.value_dim);
    }
  }
  for (std::int64_t i = 0; i < value.num_heads; ++i) {
    const Target& target = heads[i].target;
    const SoftmaxState& state = scratch.states[heads[i].query];
    if (target.partial) {
      target.state[task.part_offset + token] = state;
    } else {
      narrow(static_cast<T*>(target.output) + token * task.output_stride, sums_of(i), task.value_dim,
             state.inverse_sum());
    }
  }
}

template <typename T>
void stream(const StreamTask& task, float* memory) {
  const StreamScratch scratch(task, memory);
  for (std::int64_t token = 0; token < task.tokens; ++token) {
    const std::int64_t rows = least(task.end, task.position + token + 1) - task.begin;
    if (rows <= 0) continue;  // this token sees nothing of the range; the merge knows
    stream_scores<T>(task, token, rows, scratch);
    for (std::int64_t i = 0; i < task.num_values; ++i) {
      stream_value<T>(task, task.values[i], token, rows, scratch);
    }
  }
}

}  // namespace CHAI_ISA
}  // namespace chai
