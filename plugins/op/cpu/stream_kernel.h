// Decode: a few tokens against a long cache. Bound by memory, so every K and V row is read once, in order.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace chai {
namespace CHAI_ISA {

// Memory is read fastest in one ascending stream per thread: a step that touches several rows at a time costs
// a third of the bandwidth, software prefetch a sixth (benchmarks/experiments.md).
constexpr int kSumsAtOnce = 4;                          // vectors that sums() adds up
constexpr int kSharedRows = 16;                         // rows that stay in L1 while several heads use them
constexpr int kRowsFromL1 = 8;                          // of these, rows per step of a weighted sum
constexpr int kMostRegisters = kLanes == 16 ? 24 : 12;  // accumulators of one head's weighted sum

// query · key; the vector still to be summed up.
template <typename T>
CHAI_INLINE Vec dot_lanes(const float* query, const T* key, std::int64_t vectors) {
  Vec even = {}, odd = {};
  std::int64_t i = 0;
  for (; i + 2 <= vectors; i += 2) {
    even += load(query + i * kLanes) * load(key + i * kLanes);
    odd += load(query + (i + 1) * kLanes) * load(key + (i + 1) * kLanes);
  }
  if (i < vectors) even += load(query + i * kLanes) * load(key + i * kLanes);
  return even + odd;
}

template <typename T>
CHAI_INLINE float dot_tail(const float* query, const T* key, std::int64_t first, std::int64_t dim) {
  float total = 0.0f;
  for (std::int64_t d = first; d < dim; ++d) total += query[d] * load_one(key + d);
  return total;
}

// scores[t] = query · keys[t]
template <typename T>
void dots_of_one(const float* query, const T* keys, std::int64_t rows, std::int64_t dim, float* scores) {
  const std::int64_t vectors = dim / kLanes, tail = vectors * kLanes;
  std::int64_t t = 0;
  for (; t + kSumsAtOnce <= rows; t += kSumsAtOnce) {
    Vec lanes[kSumsAtOnce];
#pragma GCC unroll 4
    for (int r = 0; r < kSumsAtOnce; ++r) lanes[r] = dot_lanes(query, keys + (t + r) * dim, vectors);
    Quad total = sums(lanes[0], lanes[1], lanes[2], lanes[3]);
    if (tail < dim) {
      for (int r = 0; r < kSumsAtOnce; ++r) total[r] += dot_tail(query, keys + (t + r) * dim, tail, dim);
    }
    __builtin_memcpy(scores + t, &total, sizeof(total));
  }
  for (; t < rows; ++t) {
    scores[t] = sum(dot_lanes(query, keys + t * dim, vectors)) + dot_tail(query, keys + t * dim, tail, dim);
  }
}

// scores[q][t] = queries[q] · keys[t] for four queries.
template <typename T>
void dots_of_four(const float* const* queries, const T* keys, std::int64_t rows, std::int64_t dim,
                  float* const* scores) {
  const std::int64_t vectors = dim / kLanes, tail = vectors * kLanes;
  for (std::int64_t t = 0; t < rows; ++t) {
    const T* key = keys + t * dim;
    Vec lanes[kSumsAtOnce] = {};
    for (std::int64_t i = 0; i < vectors; ++i) {
      const Vec k = load(key + i * kLanes);
#pragma GCC unroll 4
      for (int q = 0; q < kSumsAtOnce; ++q) lanes[q] += load(queries[q] + i * kLanes) * k;
    }
    const Quad total = sums(lanes[0], lanes[1], lanes[2], lanes[3]);
    for (int q = 0; q < kSumsAtOnce; ++q) scores[q][t] = total[q] + dot_tail(queries[q], key, tail, dim);
  }
}

// scores[q][t] = queries[q] · keys[t]
template <typename T>
void dots(const float* queries, std::int64_t num_queries, const T* keys, std::int64_t rows, std::int64_t dim,
          float* scores, std::int64_t score_stride) {
  if (num_queries == 1) return dots_of_one(queries, keys, rows, dim, scores);
  for (std::int64_t t = 0; t < rows; t += kSharedRows) {
    const std::int64_t n = least(kSharedRows, rows - t);
    for (std::int64_t first = 0; first < num_queries; first += kSumsAtOnce) {
      const float* query[kSumsAtOnce];
      float* to[kSumsAtOnce];
      for (int i = 0; i < kSumsAtOnce; ++i) {
        const std::int64_t q = least(first + i, num_queries - 1);  // the last one again fills up the four
        query[i] = queries + q * dim;
        to[i] = scores + q * score_stride + t;
      }
      dots_of_four(query, keys + t * dim, n, dim, to);
    }
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

// out += weights · values, ROWS rows at a time: for rows that are in L1.
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
void weighted_sum_from_l1(float* out, const T* values, const float* weights, std::int64_t rows,
                          std::int64_t dim) {
  std::int64_t t = 0;
  for (; t + kRowsFromL1 <= rows; t += kRowsFromL1) {
    add_rows<kRowsFromL1>(out, values + t * dim, weights + t, dim);
  }
  for (; t < rows; ++t) add_rows<1>(out, values + t * dim, weights + t, dim);
}

// out += weights · values, one row after the other: the first REGISTERS vectors of out are kept in registers.
template <int REGISTERS, typename T>
void weighted_sum_registers(float* out, const T* values, const float* weights, std::int64_t rows,
                            std::int64_t dim) {
  Vec total[REGISTERS];
#pragma GCC unroll 24
  for (int i = 0; i < REGISTERS; ++i) total[i] = load(out + i * kLanes);
  constexpr std::int64_t kRest = REGISTERS * kLanes;
  for (std::int64_t t = 0; t < rows; ++t) {
    const T* row = values + t * dim;
    const Vec weight = splat(weights[t]);
#pragma GCC unroll 24
    for (int i = 0; i < REGISTERS; ++i) total[i] += weight * load(row + i * kLanes);
    if (dim > kRest) add_rows<1>(out + kRest, row + kRest, weights + t, dim - kRest);
  }
#pragma GCC unroll 24
  for (int i = 0; i < REGISTERS; ++i) store(out + i * kLanes, total[i]);
}

template <typename T>
void weighted_sum(float* out, const T* values, const float* weights, std::int64_t rows, std::int64_t dim) {
  const std::int64_t vectors = dim / kLanes;
  if (vectors >= kMostRegisters) {
    weighted_sum_registers<kMostRegisters>(out, values, weights, rows, dim);
  } else if (vectors >= 8) {
    weighted_sum_registers<8>(out, values, weights, rows, dim);
  } else if (vectors >= 4) {
    weighted_sum_registers<4>(out, values, weights, rows, dim);
  } else {
    weighted_sum_from_l1(out, values, weights, rows, dim);  // rows so short that several are one stream
  }
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
      const T* from = values + t * task.value_dim;
      const std::int64_t n = least(step, rows - t);
      if (i == 0) {
        weighted_sum(sums_of(i), from, weights, n, task.value_dim);
      } else {
        weighted_sum_from_l1(sums_of(i), from, weights, n, task.value_dim);
      }
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
