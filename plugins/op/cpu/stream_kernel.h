// Decode: a few tokens against a long cache. Bound by memory, so every K and V row is read once, in order.
#pragma once

#include "op/cpu/kernels.h"
#include "op/cpu/vector.h"

namespace chai {
namespace CHAI_ISA {

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

// score = softcap(score) + slope * (t + distance)
CHAI_INLINE void add_terms(float* scores, std::int64_t n, float softcap, float slope, float distance) {
  if (softcap == 0.0f && slope == 0.0f) return;
  const float inverse = softcap == 0.0f ? 0.0f : 1.0f / softcap;
  for (std::int64_t t = 0; t < n; t += kLanes) {  // scores are padded to whole vectors
    Vec score = load(scores + t);
    if (softcap != 0.0f) score = tanh_of(score * inverse) * softcap;
    store(scores + t, score + (lane_numbers() + (static_cast<float>(t) + distance)) * slope);
  }
}

struct StreamScratch {
  float* scores;          // [queries][score_stride]
  float* queries;         // [queries][key_dim], scaled
  SoftmaxState* states;   // [queries]
  float* sums;            // [heads of one KV head][value_dim]
  const float** weights;  // [heads of one KV head]
  float** targets;        // [heads of one KV head]
  float* rows;            // of the row kernels
  std::int64_t score_stride;

  static std::int64_t most_heads(const StreamTask& task) {
    std::int64_t heads = 1;
    for (std::int64_t i = 0; i < task.num_values; ++i) heads = most(heads, task.values[i].num_heads);
    return heads;
  }

  StreamScratch(const StreamTask& task, float* memory) : score_stride(round_up(task.end - task.begin, 16)) {
    const Common& common = *task.common;
    const std::int64_t heads = most_heads(task);
    scores = memory;
    queries = scores + task.num_queries * score_stride;
    states = reinterpret_cast<SoftmaxState*>(queries + task.num_queries * common.key_dim);
    sums = reinterpret_cast<float*>(states + task.num_queries);
    rows = sums + heads * common.value_dim;
    float* pointers = rows + row_floats(common);
    pointers += reinterpret_cast<std::uintptr_t>(pointers) % sizeof(void*) / sizeof(float);
    weights = reinterpret_cast<const float**>(pointers);
    targets = const_cast<float**>(weights) + heads;
  }

  static std::int64_t row_floats(const Common& common) {
    return most(common.keys->scratch(common.key_dim, common.group),
                common.values->scratch(common.value_dim, common.group));
  }

  static std::size_t size(const StreamTask& task) {
    const Common& common = *task.common;
    const std::int64_t heads = most_heads(task);
    const std::int64_t per_query = round_up(task.end - task.begin, 16) + common.key_dim + 2;
    const std::int64_t pointers = 2 * heads * static_cast<std::int64_t>(sizeof(void*) / sizeof(float)) + 2;
    return task.num_queries * per_query + heads * common.value_dim + row_floats(common) + pointers;
  }
};

// What one token sees of the task's range.
struct Seen {
  std::int64_t token, begin, end;
};

// Weights of all representatives of the component for one token.
inline void stream_scores(const StreamTask& task, const Seen& seen, const StreamScratch& scratch) {
  const Common& common = *task.common;
  const std::int64_t dim = common.key_dim, stride = scratch.score_stride;
  for (std::int64_t i = 0; i < task.num_queries; ++i) {
    const auto* query =
        static_cast<const char*>(task.queries[i].values) + seen.token * dim * common.element->size;
    common.element->widen(scratch.queries + i * dim, query, dim, common.scale);
  }
  for (std::int64_t i = 0; i < task.num_slots; ++i) {
    const StreamTask::Slot& slot = task.slots[i];
    const Queries queries{scratch.queries + slot.first_query * dim, slot.num_queries, dim};
    float* scores = scratch.scores + slot.first_query * stride;
    for_each_block(slot.keys, seen.begin, seen.end, [&](const RowBlock& block, std::int64_t position) {
      common.keys->dots(queries, block, dim, common.group, scores + (position - seen.begin), stride,
                        scratch.rows);
    });
  }
  const auto distance = static_cast<float>(seen.begin - (task.position + seen.token));
  for (std::int64_t i = 0; i < task.num_queries; ++i) {
    float* scores = scratch.scores + i * stride;
    add_terms(scores, seen.end - seen.begin, common.softcap, task.queries[i].slope, distance);
    scratch.states[i] = soften(scores, seen.end - seen.begin);
  }
}

// All query heads of one KV head, for one token.
inline void stream_value(const StreamTask& task, const StreamTask::Value& value, const Seen& seen,
                         const StreamScratch& scratch) {
  const Common& common = *task.common;
  const std::int64_t dim = common.value_dim;
  const StreamTask::Head* heads = task.heads + value.first_head;
  const std::int64_t entry = task.part_offset + seen.token;
  for (std::int64_t i = 0; i < value.num_heads; ++i) {
    float* partial = heads[i].target.partial;
    scratch.targets[i] = partial ? partial + entry * dim : scratch.sums + i * dim;
    __builtin_memset(scratch.targets[i], 0, dim * sizeof(float));
  }
  for_each_block(value.values, seen.begin, seen.end, [&](const RowBlock& block, std::int64_t position) {
    for (std::int64_t i = 0; i < value.num_heads; ++i) {
      scratch.weights[i] = scratch.scores + heads[i].query * scratch.score_stride + (position - seen.begin);
    }
    common.values->add(scratch.targets, scratch.weights, value.num_heads, block, dim, common.group,
                       scratch.rows);
  });
  for (std::int64_t i = 0; i < value.num_heads; ++i) {
    const Target& target = heads[i].target;
    const SoftmaxState state = scratch.states[heads[i].query];
    if (target.partial) {
      target.state[entry] = state;
    } else {
      auto* to = static_cast<char*>(target.output) + seen.token * common.output_stride * common.element->size;
      common.element->narrow(to, scratch.targets[i], dim, state.weight_beside(target.sink));
    }
  }
}

inline void stream(const StreamTask& task, float* memory) {
  const StreamScratch scratch(task, memory);
  const std::int64_t window = task.common->window;
  for (std::int64_t token = 0; token < task.tokens; ++token) {
    const std::int64_t after = task.position + token + 1;
    const Seen seen{token, most(task.begin, window > 0 ? after - window : 0), least(task.end, after)};
    if (seen.begin >= seen.end) continue;  // its state stays empty
    stream_scores(task, seen, scratch);
    for (std::int64_t i = 0; i < task.num_values; ++i) stream_value(task, task.values[i], seen, scratch);
  }
}

}  // namespace CHAI_ISA
}  // namespace chai
