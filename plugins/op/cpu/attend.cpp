// The stages of one call: probe, append (but for the shared op), attend, merge. A stage's tasks run in
// parallel.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

#include "chai/attention.h"
#include "plan.h"

namespace chai {
namespace {

// Below this much work a stage runs on the calling thread: waking another costs more.
constexpr std::size_t kInlineBytes = std::size_t{1} << 18;

// Memory of one thread for one task at a time; it grows to the largest need and is kept.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  float* floats(std::size_t count) {
    if (count > size_) {
      const std::size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
      void* larger = std::aligned_alloc(64, bytes);
      if (larger == nullptr) throw std::bad_alloc();
      std::free(memory_);
      memory_ = static_cast<float*>(larger);
      size_ = bytes / sizeof(float);
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  std::size_t size_ = 0;
};

float* scratch(std::size_t floats) {
  thread_local Scratch memory;
  return memory.floats(floats);
}

// Runs body(i) for each i. An exception in a task reaches the caller, never the thread pool.
template <typename Body>
void for_each(const Executor& executor, std::size_t count, bool parallel, const Body& body) {
  if (!parallel || count < 2) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    std::atomic<bool> failed{false};
  } shared{body};
  executor.run(
      executor.context, count,
      [](void* data, std::size_t i) {
        Shared& s = *static_cast<Shared*>(data);
        try {
          s.body(i);
        } catch (...) {
          s.failed = true;
        }
      },
      &shared);
  if (shared.failed) throw std::bad_alloc();  // allocation is all that can fail in a task
}

std::vector<Row> active_rows(const AttentionCall& call) {
  const AttentionShape& s = call.shape;
  std::vector<Row> rows;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    if (call.lengths[b] == 0) continue;
    Row row;
    row.index = b;
    row.past = call.past_lengths[b];
    row.new_tokens = call.lengths[b];
    row.fresh = call.online && row.past == 0;
    row.exact = row.fresh ? std::min(call.probe_tokens, row.new_tokens) : 0;
    const std::int32_t* map = call.past_head_map + b * s.heads;
    row.head_map.assign(map, map + s.heads);
    rows.push_back(std::move(row));
  }
  return rows;
}

// Exact attention over the first tokens of fresh rows, then their maps.
void probe(const AttentionCall& call, const Kernels& kernel, const Executor& executor,
           std::vector<Row>* rows) {
  const AttentionShape& s = call.shape;
  const std::int64_t element = element_size(call.storage);
  const std::int64_t group = s.heads / s.kv_heads;
  std::vector<Row*> fresh;
  for (Row& row : *rows) {
    if (row.fresh) fresh.push_back(&row);
  }
  if (fresh.empty()) return;
  const std::int64_t most_tokens = std::min(call.probe_tokens, s.tokens);
  const std::int64_t features = most_tokens * (most_tokens + 1) / 2;
  std::vector<std::int32_t> quantised(fresh.size() * s.heads * features, 0);
  const std::size_t bytes = quantised.size() * (s.key_dim + s.value_dim) * element;
  for_each(executor, fresh.size() * s.heads, bytes > kInlineBytes, [&](std::size_t i) {
    const Row& row = *fresh[i / s.heads];
    const std::int64_t h = static_cast<std::int64_t>(i) % s.heads;
    const std::int64_t kv = row.index * s.kv_heads + h / group;
    const auto* values = static_cast<const char*>(call.shared() ? call.present_value : call.value);
    ProbeTask task;
    task.query =
        matrix(static_cast<const char*>(call.query), row.index * s.heads + h, s.tokens, s.key_dim * element);
    task.key = matrix(static_cast<const char*>(call.key), kv, s.tokens, s.key_dim * element);
    // A fresh row's first tokens are the first positions of its cache.
    task.value = matrix(values, kv, call.shared() ? s.capacity : s.tokens, s.value_dim * element);
    task.tokens = row.exact;
    task.key_dim = s.key_dim;
    task.value_dim = s.value_dim;
    task.scale = score_scale(call);
    task.output =
        static_cast<char*>(call.output) + (row.index * s.tokens * s.heads + h) * s.value_dim * element;
    task.output_stride = s.heads * s.value_dim;
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

// present = past with the new rows of a [position][dim] matrix at `position`.
struct Append {
  const char* past;  // null: in place
  char* present;
  std::size_t capacity_bytes;
  const char* rows;  // null: no new rows
  std::size_t offset_bytes, row_bytes;
};

void append(const AttentionCall& call, const Executor& executor, const std::vector<Row>& rows) {
  const AttentionShape& s = call.shape;
  const std::int64_t element = element_size(call.storage);
  std::vector<const Row*> row_of(s.batch, nullptr);
  for (const Row& row : rows) row_of[row.index] = &row;
  std::vector<Append> tasks;
  std::size_t bytes = 0;
  const auto add = [&](const void* past, void* present, std::int64_t index, std::int64_t dim,
                       const char* fresh, const Row* row) {
    const std::size_t row_bytes = dim * element;
    Append task{};
    task.capacity_bytes = s.capacity * row_bytes;
    task.present = static_cast<char*>(present) + index * task.capacity_bytes;
    if (past != present) task.past = static_cast<const char*>(past) + index * task.capacity_bytes;
    if (fresh != nullptr) {
      task.rows = fresh;
      task.offset_bytes = row->past * row_bytes;
      task.row_bytes = row->new_tokens * row_bytes;
    }
    if (task.past == nullptr && task.rows == nullptr) return;
    bytes += task.row_bytes + (task.past ? task.capacity_bytes : 0);
    tasks.push_back(task);
  };
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const Row* row = row_of[b];
    std::vector<std::int64_t> kv_head_of(s.kept, -1);
    for (std::int64_t g = 0; row && g < s.kv_heads; ++g) {
      if (row->slots.of_kv_head[g] >= 0) kv_head_of[row->slots.of_kv_head[g]] = g;
    }
    for (std::int64_t slot = 0; slot < s.kept; ++slot) {
      const char* fresh = kv_head_of[slot] < 0
                              ? nullptr
                              : matrix(static_cast<const char*>(call.key), b * s.kv_heads + kv_head_of[slot],
                                       s.tokens, s.key_dim * element);
      add(call.past_key, call.present_key, b * s.kept + slot, s.key_dim, fresh, row);
    }
    for (std::int64_t g = 0; g < s.kv_heads; ++g) {
      const char* fresh = row ? matrix(static_cast<const char*>(call.value), b * s.kv_heads + g, s.tokens,
                                       s.value_dim * element)
                              : nullptr;
      add(call.past_value, call.present_value, b * s.kv_heads + g, s.value_dim, fresh, row);
    }
  }
  for_each(executor, tasks.size(), bytes > kInlineBytes, [&](std::size_t i) {
    const Append& task = tasks[i];
    if (task.past) std::memcpy(task.present, task.past, task.capacity_bytes);
    if (task.rows) std::memcpy(task.present + task.offset_bytes, task.rows, task.row_bytes);
  });
}

// Head maps out, and zeros where a token index is at or past its row's length.
void finish_rows(const AttentionCall& call) {
  const AttentionShape& s = call.shape;
  const std::int64_t token_bytes = s.heads * s.value_dim * element_size(call.storage);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    char* padding = static_cast<char*>(call.output) + (b * s.tokens + call.lengths[b]) * token_bytes;
    std::memset(padding, 0, (s.tokens - call.lengths[b]) * token_bytes);
  }
}

}  // namespace

void attend(const AttentionCall& call, Isa isa, const Executor& executor) {
  attend(call, kernels(isa, call.storage), executor);
}

void attend(const AttentionCall& call, const Kernels& kernel, const Executor& executor) {
  const AttentionShape& s = call.shape;
  std::vector<Row> rows = active_rows(call);
  probe(call, kernel, executor, &rows);
  if (call.present_head_map != call.past_head_map) {
    std::memcpy(call.present_head_map, call.past_head_map, s.batch * s.heads * sizeof(std::int32_t));
  }
  for (Row& row : rows) {
    const std::int32_t* keeping = call.shared() ? call.kept_map(row.index) : row.head_map.data();
    row.slots = assign_slots(keeping, s.heads, s.kv_heads);
    std::memcpy(call.present_head_map + row.index * s.heads, row.head_map.data(),
                s.heads * sizeof(std::int32_t));
  }
  if (!call.shared()) append(call, executor, rows);
  finish_rows(call);

  const Plan plan(call, rows, executor.threads);
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
  for (const MergeTask& task : plan.merges()) {
    const std::int64_t parts = (task.position + task.tokens) / task.part_length + 1;
    merge_bytes += parts * task.tokens * task.value_dim * sizeof(float);
  }
  for_each(executor, plan.merges().size(), merge_bytes > kInlineBytes, [&](std::size_t i) {
    const MergeTask& task = plan.merges()[i];
    kernel.merge(task, scratch(kernel.merge_scratch(task)));
  });
}

}  // namespace chai
