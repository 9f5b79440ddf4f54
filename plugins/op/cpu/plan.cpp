#include "plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace chai {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// Rows with this many tokens or fewer are streamed: below it, reading the cache costs more than arithmetic.
constexpr std::int64_t kMaxStreamTokens = 4;

// A task is worth handing to another thread from about this many bytes of cache on; beyond the larger figure
// tasks are cut even if every thread has some.
constexpr std::int64_t kLeastTaskBytes = std::int64_t{1} << 18;
constexpr std::int64_t kMostTaskBytes = std::int64_t{1} << 22;
constexpr std::int64_t kTasksPerThread = 8;
constexpr std::int64_t kPartUnit = 64;        // part lengths are multiples of this, in positions
constexpr std::int64_t kLeastTilePart = 512;  // positions
constexpr std::int64_t kMostTileHeads = 32;   // accumulators of one task
constexpr std::int64_t kFewTileHeads = 8;     // the same when there is little work to share out

std::int64_t divide_up(std::int64_t n, std::int64_t unit) {
  return (n + unit - 1) / unit;
}
std::int64_t round_up(std::int64_t n, std::int64_t unit) {
  return divide_up(n, unit) * unit;
}

std::int64_t root(std::vector<std::int64_t>& parent, std::int64_t i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

}  // namespace

float score_scale(const AttentionCall& call) {
  return call.scale != 0.0f ? call.scale : 1.0f / std::sqrt(static_cast<float>(call.shape.key_dim));
}

Plan::Plan(const AttentionCall& call, const std::vector<Row>& rows, std::size_t threads)
    : call_(call),
      shape_(call.shape),
      element_(element_size(call.storage)),
      log2_scale_(score_scale(call) * kLog2E) {
  const std::int64_t wanted_tasks = kTasksPerThread * static_cast<std::int64_t>(threads);
  const std::int64_t bytes_per_position =
      element_ * (shape_.kept * shape_.key_dim + shape_.kv_heads * shape_.value_dim);
  std::int64_t stream_bytes = 0;
  for (const Row& row : rows) {
    if (row.tokens() <= kMaxStreamTokens) stream_bytes += row.end() * bytes_per_position;
  }
  const std::int64_t bytes_per_task =
      std::clamp(stream_bytes / std::max<std::int64_t>(wanted_tasks, 1), kLeastTaskBytes, kMostTaskBytes);
  for (const Row& row : rows) {
    if (row.tokens() == 0) continue;
    if (row.tokens() <= kMaxStreamTokens) {
      plan_streams(row, bytes_per_task);
    } else {
      plan_tiles(row, divide_up(wanted_tasks, static_cast<std::int64_t>(rows.size())));
    }
  }
  // The largest first, so that the last to finish is small.
  std::stable_sort(tiles_.begin(), tiles_.end(), [](const TileTask& a, const TileTask& b) {
    return a.tokens * (a.end - a.begin) * (a.num_heads + 1) >
           b.tokens * (b.end - b.begin) * (b.num_heads + 1);
  });
}

const void* Plan::slot_keys(const Row& row, std::int64_t kv_head) const {
  const std::int64_t slot = row.slots.of_kv_head[kv_head];
  return matrix(static_cast<const char*>(call_.present_key), row.index * shape_.kept + slot, shape_.capacity,
                shape_.key_dim * element_);
}

const void* Plan::query(const Row& row, std::int64_t head, std::int64_t token) const {
  const std::int64_t row_bytes = shape_.key_dim * element_;
  return matrix(static_cast<const char*>(call_.query), row.index * shape_.heads + head, shape_.tokens,
                row_bytes) +
         token * row_bytes;
}

const void* Plan::values(const Row& row, std::int64_t kv_head) const {
  return matrix(static_cast<const char*>(call_.present_value), row.index * shape_.kv_heads + kv_head,
                shape_.capacity, shape_.value_dim * element_);
}

Target Plan::target(const Row& row, std::int64_t head) const {
  Target target;
  const std::int64_t token = row.index * shape_.tokens + row.exact;
  target.output =
      static_cast<char*>(call_.output) + (token * shape_.heads + head) * shape_.value_dim * element_;
  return target;
}

void Plan::split(const Row& row, Target* target, std::int64_t parts, std::int64_t part_length) {
  const std::int64_t entries = parts * row.tokens();
  memory_.emplace_back(new float[entries * (shape_.value_dim + 2)]);
  target->state = reinterpret_cast<SoftmaxState*>(memory_.back().get());
  target->partial = memory_.back().get() + 2 * entries;
  merges_.push_back({*target, row.tokens(), row.position(), part_length, shape_.value_dim,
                     shape_.heads * shape_.value_dim});
}

std::deque<Plan::Component> Plan::components(const Row& row) const {
  // Nodes 0 … G-1 are KV heads as values; a KV head that is kept stands for its slot under G + itself.
  const std::int64_t group = shape_.heads / shape_.kv_heads;
  std::vector<std::int64_t> parent(2 * shape_.kv_heads);
  std::iota(parent.begin(), parent.end(), 0);
  for (std::int64_t h = 0; h < shape_.heads; ++h) {
    const std::int64_t slot = shape_.kv_heads + row.head_map[h] / group;
    parent[root(parent, h / group)] = root(parent, slot);
  }
  std::deque<Component> all;
  std::vector<Component*> of_root(parent.size(), nullptr);
  for (std::int64_t g = 0; g < shape_.kv_heads; ++g) {
    Component*& component = of_root[root(parent, g)];
    if (component == nullptr) component = &all.emplace_back();
    component->kv_heads.push_back(g);
  }
  std::vector<std::int32_t> query_of(shape_.heads, -1);  // of a representative, inside its component
  std::vector<bool> represents(shape_.heads, false);
  for (std::int64_t h = 0; h < shape_.heads; ++h) represents[row.head_map[h]] = true;
  for (std::int64_t g = 0; g < shape_.kv_heads; ++g) {
    // A layer that reads another's cache may leave kept KV heads unused.
    const auto first_head = represents.begin() + g * group;
    if (std::find(first_head, first_head + group, true) == first_head + group) continue;
    Component& component = *of_root[root(parent, shape_.kv_heads + g)];
    const auto first = static_cast<std::int32_t>(component.queries.size());
    for (std::int64_t r = g * group; r < (g + 1) * group; ++r) {
      if (!represents[r]) continue;
      query_of[r] = static_cast<std::int32_t>(component.queries.size());
      component.queries.push_back(query(row, r, row.exact));
    }
    const auto count = static_cast<std::int32_t>(component.queries.size()) - first;
    component.slots.push_back({slot_keys(row, g), first, count});
  }
  for (Component& component : all) {
    for (std::int64_t g : component.kv_heads) {
      const auto first = static_cast<std::int32_t>(component.heads.size());
      component.values.push_back({values(row, g), first, static_cast<std::int32_t>(group)});
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h) {
        component.heads.push_back({query_of[row.head_map[h]], target(row, h)});
      }
    }
  }
  return all;
}

void Plan::plan_streams(const Row& row, std::int64_t bytes_per_task) {
  for (Component& found : components(row)) {
    Component& component = components_.emplace_back(std::move(found));
    const std::int64_t bytes_per_position =
        element_ * (static_cast<std::int64_t>(component.slots.size()) * shape_.key_dim +
                    static_cast<std::int64_t>(component.values.size()) * shape_.value_dim);
    const std::int64_t part_length =
        std::min(round_up(std::max<std::int64_t>(bytes_per_task / bytes_per_position, 1), kPartUnit),
                 round_up(row.end(), kPartUnit));
    const std::int64_t parts = divide_up(row.end(), part_length);
    if (parts > 1) {
      for (StreamTask::Head& head : component.heads) split(row, &head.target, parts, part_length);
    }
    for (std::int64_t part = 0; part < parts; ++part) {
      StreamTask task;
      task.slots = component.slots.data();
      task.num_slots = static_cast<std::int64_t>(component.slots.size());
      task.queries = component.queries.data();
      task.num_queries = static_cast<std::int64_t>(component.queries.size());
      task.values = component.values.data();
      task.num_values = static_cast<std::int64_t>(component.values.size());
      task.heads = component.heads.data();
      task.tokens = row.tokens();
      task.position = row.position();
      task.begin = part * part_length;
      task.end = std::min(row.end(), task.begin + part_length);
      task.part_offset = part * row.tokens();
      task.key_dim = shape_.key_dim;
      task.value_dim = shape_.value_dim;
      task.output_stride = shape_.heads * shape_.value_dim;
      task.scale = log2_scale_;
      streams_.push_back(task);
    }
  }
}

void Plan::plan_tiles(const Row& row, std::int64_t wanted_tasks) {
  const std::int64_t group = shape_.heads / shape_.kv_heads;
  const std::int64_t blocks = divide_up(row.tokens(), kMaxTileTokens);
  const bool scarce = row.slots.used * blocks < wanted_tasks;
  const std::int64_t most_heads = scarce ? kFewTileHeads : kMostTileHeads;

  // Clusters, the largest cut into pieces that compute their scores again.
  std::vector<std::vector<TileTask::Head>*> pieces_of(shape_.heads, nullptr);
  std::vector<std::pair<std::int64_t, std::vector<TileTask::Head>*>> pieces;
  std::vector<Target> targets;
  for (std::int64_t h = 0; h < shape_.heads; ++h) {
    const std::int64_t representative = row.head_map[h];
    std::vector<TileTask::Head>*& piece = pieces_of[representative];
    if (piece == nullptr || static_cast<std::int64_t>(piece->size()) == most_heads) {
      piece = &tile_heads_.emplace_back();
      pieces.emplace_back(representative, piece);
    }
    piece->push_back({values(row, h / group), target(row, h)});
  }

  // Few tasks and a long cache: the keys are split too.
  const std::int64_t tasks = static_cast<std::int64_t>(pieces.size()) * blocks;
  const std::int64_t wanted_parts = divide_up(wanted_tasks, tasks);
  const std::int64_t part_length =
      std::max(kLeastTilePart, round_up(divide_up(row.end(), wanted_parts), kPartUnit));
  const std::int64_t parts = divide_up(row.end(), part_length);
  for (auto& [representative, heads] : pieces) {
    if (parts > 1) {
      for (TileTask::Head& head : *heads) split(row, &head.target, parts, part_length);
    }
    for (std::int64_t first = 0; first < row.tokens(); first += kMaxTileTokens) {
      TileTask task;
      task.query = query(row, representative, row.exact + first);
      task.keys = slot_keys(row, representative / group);
      task.heads = heads->data();
      task.num_heads = static_cast<std::int64_t>(heads->size());
      task.tokens = std::min(kMaxTileTokens, row.tokens() - first);
      task.position = row.position() + first;
      task.first = first;
      task.key_dim = shape_.key_dim;
      task.value_dim = shape_.value_dim;
      task.output_stride = shape_.heads * shape_.value_dim;
      task.scale = log2_scale_;
      const std::int64_t end = task.position + task.tokens;
      for (std::int64_t part = 0; part * part_length < end; ++part) {
        task.begin = part * part_length;
        task.end = parts > 1 ? std::min(end, task.begin + part_length) : end;
        task.part_offset = part * row.tokens();
        tiles_.push_back(task);
      }
    }
  }
}

}  // namespace chai
