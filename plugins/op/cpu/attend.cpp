// The stages of one call: probe, append (but for the shared op), attend, merge. A stage's tasks run in
// parallel.
#include <cmath>
#include <cstring>

#include "chai/attention.h"
#include "op/cpu/append.h"
#include "op/cpu/plan.h"
#include "op/cpu/stages.h"

namespace chai {
namespace {

Common common_of(const AttentionCall& call, const Kernels& kernel) {
  Common common{};
  common.element = kernel.element(call.storage);
  common.keys = kernel.rows(call.keys.storage);
  common.values = kernel.rows(call.values.storage);
  common.key_dim = call.shape.key_dim;
  common.value_dim = call.shape.value_dim;
  common.group = call.group;
  common.output_stride = call.shape.heads * call.shape.value_dim;
  common.window = call.window;
  common.scale = score_scale(call) * kLog2E;
  common.softcap = call.softcap * kLog2E;
  return common;
}

// Exact attention over the first tokens of fresh rows, then their maps.
void probe(const AttentionCall& call, const Common& common, const Kernels& kernel, const Executor& executor,
           std::vector<Row>* rows) {
  const AttentionShape& s = call.shape;
  const std::int64_t group = s.heads / s.kv_heads;
  std::vector<Row*> fresh;
  for (Row& row : *rows) {
    if (row.fresh) fresh.push_back(&row);
  }
  if (fresh.empty()) return;
  const std::int64_t most_tokens = std::min(call.probe_tokens, s.tokens);
  const std::int64_t features = most_tokens * (most_tokens + 1) / 2;
  std::vector<std::int32_t> quantised(fresh.size() * s.heads * features, 0);
  const std::size_t bytes = quantised.size() * (s.key_dim + s.value_dim) * sizeof(float);
  for_each(executor, fresh.size() * s.heads, bytes > kInlineBytes, [&](std::size_t i) {
    const Row& row = *fresh[i / s.heads];
    const std::int64_t h = static_cast<std::int64_t>(i) % s.heads;
    const std::int64_t kv = row.index * s.kv_heads + h / group;
    ProbeTask task{};
    task.common = &common;
    task.query = activations(call, call.query, row.index * s.heads + h, s.tokens, s.key_dim);
    task.key = activations(call, call.key, kv, s.tokens, s.key_dim);
    task.value = activations(call, call.value, kv, s.tokens, s.value_dim);
    task.tokens = row.exact;
    task.scale = score_scale(call);
    task.softcap = call.softcap;
    task.sink = sink_of(call, h);
    task.slope = call.slopes == nullptr ? 0.0f : call.slopes[h];
    task.output = static_cast<char*>(call.output) +
                  (row.index * s.tokens * s.heads + h) * row_bytes(call.storage, s.value_dim);
    task.quantised = quantised.data() + i * features;
    kernel.probe(task, scratch(kernel.probe_scratch(task)));
  });
  for_each(executor, fresh.size(), features * s.heads * s.heads > 4096, [&](std::size_t i) {
    const std::int32_t* of_row = quantised.data() + i * s.heads * features;
    std::int32_t* head_map = fresh[i]->head_map.data();
    if (call.shared()) {
      const Slots kept = assign_slots(call.kept_map(fresh[i]->index), s.heads, s.kv_heads);
      assign_heads(of_row, features, s.heads, s.kv_heads, kept, head_map);
    } else {
      cluster_heads(of_row, features, s.heads, s.kv_heads, s.kept, head_map);
    }
  });
}

// Zeros where a token index is at or past its row's length.
void clear_padding(const AttentionCall& call) {
  const AttentionShape& s = call.shape;
  const std::int64_t token_bytes = s.heads * row_bytes(call.storage, s.value_dim);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    char* padding = static_cast<char*>(call.output) + (b * s.tokens + call.lengths[b]) * token_bytes;
    std::memset(padding, 0, (s.tokens - call.lengths[b]) * token_bytes);
  }
}

}  // namespace

void attend(const AttentionCall& call, Isa isa, const Executor& executor) {
  attend(call, kernels(isa), executor);
}

void attend(const AttentionCall& call, const Kernels& kernel, const Executor& executor) {
  const AttentionShape& s = call.shape;
  const Common common = common_of(call, kernel);
  std::vector<Row> rows = active_rows(call);
  probe(call, common, kernel, executor, &rows);
  if (call.present_head_map != call.past_head_map) {
    std::memcpy(call.present_head_map, call.past_head_map, s.batch * s.heads * sizeof(std::int32_t));
  }
  for (Row& row : rows) {
    const std::int32_t* keeping = call.shared() ? call.kept_map(row.index) : row.head_map.data();
    row.slots = assign_slots(keeping, s.heads, s.kv_heads);
    std::memcpy(call.present_head_map + row.index * s.heads, row.head_map.data(),
                s.heads * sizeof(std::int32_t));
  }
  if (!call.shared()) append(call, kernel, executor, rows);
  clear_padding(call);

  const Plan plan(call, common, rows, executor.threads);
  const std::size_t streams = plan.streams().size();
  for_each(executor, streams + plan.tiles().size(), true, [&](std::size_t i) {
    if (i < streams) {
      const StreamTask& task = plan.streams()[i];
      kernel.stream(task, scratch(kernel.stream_scratch(task)));
    } else {
      const TileTask& task = plan.tiles()[i - streams];
      kernel.tile(task, scratch(kernel.tile_scratch(task)));
    }
  });
  std::size_t merge_bytes = 0;
  for (const MergeTask& task : plan.merges())
    merge_bytes += task.parts * task.tokens * s.value_dim * sizeof(float);
  for_each(executor, plan.merges().size(), merge_bytes > kInlineBytes, [&](std::size_t i) {
    const MergeTask& task = plan.merges()[i];
    kernel.merge(task, scratch(kernel.merge_scratch(task)));
  });
}

}  // namespace chai
