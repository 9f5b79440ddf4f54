#include "op/cpu/plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace chai {
namespace {

// Rows with this many tokens or fewer are streamed: below it, reading the cache costs more than arithmetic.
constexpr std::int64_t kMaxStreamTokens = 4;

// A task is worth handing to another thread from about this many bytes of cache on; beyond the larger figure
// tasks are cut even if every thread has some.
constexpr std::int64_t kLeastTaskBytes = std::int64_t{1} << 18;
constexpr std::int64_t kMostTaskBytes = std::int64_t{1} << 20;
constexpr std::int64_t kTasksPerThread = 32;
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

Plan::Plan(const AttentionCall& call, const Common& common, const std::vector<Row>& rows, std::size_t threads)
    : call_(call), shape_(call.shape), common_(common) {
  const std::int64_t wanted_tasks = kTasksPerThread * static_cast<std::int64_t>(threads);
  std::int64_t stream_bytes = 0;
  for (const Row& row : rows) {
    const std::int64_t seen = row.end() - call.first_visible(row.position());
    if (row.tokens() <= kMaxStreamTokens) stream_bytes += seen * position_bytes(shape_.kept, shape_.kv_heads);
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

// Cache bytes of one position, for so many slots and value heads.
std::int64_t Plan::position_bytes(std::int64_t slots, std::int64_t values) const {
  const auto bytes = [&](const Pool& pool, std::int64_t dim) {
    return row_bytes(pool.storage, dim) + 2 * row_scales(pool.storage, dim, call_.group);
  };
  return slots * bytes(call_.keys, shape_.key_dim) + values * bytes(call_.values, shape_.value_dim);
}

const void* Plan::query(const Row& row, std::int64_t head, std::int64_t token) const {
  return activations(call_, call_.query, row.index * shape_.heads + head, shape_.tokens, shape_.key_dim) +
         token * row_bytes(call_.storage, shape_.key_dim);
}

float Plan::slope(std::int64_t head) const {
  return call_.slopes == nullptr ? 0.0f : call_.slopes[head] * kLog2E;
}

Target Plan::target(const Row& row, std::int64_t head) const {
  Target target;
  const std::int64_t token = row.index * shape_.tokens + row.exact;
  target.output = static_cast<char*>(call_.output) +
                  (token * shape_.heads + head) * row_bytes(call_.storage, shape_.value_dim);
  target.sink = sink_of(call_, head) * kLog2E;
  return target;
}

void Plan::split(const Row& row, Target* target, std::int64_t parts) {
  const std::int64_t entries = parts * row.tokens();
  memory_.emplace_back(new float[entries * (shape_.value_dim + 2)]);
  target->state = reinterpret_cast<SoftmaxState*>(memory_.back().get());
  std::fill_n(target->state, entries, SoftmaxState());
  target->partial = memory_.back().get() + 2 * entries;
  merges_.push_back({&common_, *target, row.tokens(), parts});
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
  // Heads of one representative share its weights, unless each has a slope of its own.
  std::vector<std::vector<std::int64_t>> served(shape_.heads);
  for (std::int64_t h = 0; h < shape_.heads; ++h) served[row.head_map[h]].push_back(h);
  std::vector<std::int32_t> query_of(shape_.heads, -1);  // of a query head, inside its component
  for (std::int64_t g = 0; g < shape_.kv_heads; ++g) {
    // Null for a KV head that no query head uses: it is not kept, or another layer's cache holds it.
    Component* component = of_root[root(parent, shape_.kv_heads + g)];
    if (component == nullptr) continue;
    const auto first = static_cast<std::int32_t>(component->queries.size());
    for (std::int64_t r = g * group; r < (g + 1) * group; ++r) {
      for (std::size_t i = 0; i < served[r].size(); ++i) {
        const std::int64_t h = served[r][i];
        if (i == 0 || call_.slopes != nullptr)
          component->queries.push_back({query(row, r, row.exact), slope(h)});
        query_of[h] = static_cast<std::int32_t>(component->queries.size()) - 1;
      }
    }
    const auto count = static_cast<std::int32_t>(component->queries.size()) - first;
    component->slots.push_back({keys_of(call_, row, g), first, count});
  }
  for (Component& component : all) {
    for (std::int64_t g : component.kv_heads) {
      const auto first = static_cast<std::int32_t>(component.heads.size());
      component.values.push_back({values_of(call_, row, g), first, static_cast<std::int32_t>(group)});
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h) {
        component.heads.push_back({query_of[h], target(row, h)});
      }
    }
  }
  return all;
}

void Plan::plan_streams(const Row& row, std::int64_t bytes_per_task) {
  for (Component& found : components(row)) {
    Component& component = components_.emplace_back(std::move(found));
    const std::int64_t bytes = position_bytes(static_cast<std::int64_t>(component.slots.size()),
                                              static_cast<std::int64_t>(component.values.size()));
    Range range{call_.first_visible(row.position()), row.end(), 0};
    range.part_length = std::min(round_up(std::max<std::int64_t>(bytes_per_task / bytes, 1), kPartUnit),
                                 round_up(range.end - range.first, kPartUnit));
    const std::int64_t parts = range.parts();
    if (parts > 1) {
      for (StreamTask::Head& head : component.heads) split(row, &head.target, parts);
    }
    for (std::int64_t part = 0; part < parts; ++part) {
      StreamTask task;
      task.common = &common_;
      task.slots = component.slots.data();
      task.num_slots = static_cast<std::int64_t>(component.slots.size());
      task.queries = component.queries.data();
      task.num_queries = static_cast<std::int64_t>(component.queries.size());
      task.values = component.values.data();
      task.num_values = static_cast<std::int64_t>(component.values.size());
      task.heads = component.heads.data();
      task.tokens = row.tokens();
      task.position = row.position();
      task.begin = range.first + part * range.part_length;
      task.end = std::min(range.end, task.begin + range.part_length);
      task.part_offset = part * row.tokens();
      streams_.push_back(task);
    }
  }
}

void Plan::plan_tiles(const Row& row, std::int64_t wanted_tasks) {
  const std::int64_t group = shape_.heads / shape_.kv_heads;
  const std::int64_t blocks = divide_up(row.tokens(), kMaxTileTokens);
  const bool scarce = row.slots.used * blocks < wanted_tasks;
  // A head with a slope of its own shares no weights.
  const std::int64_t most_heads = call_.slopes != nullptr ? 1 : scarce ? kFewTileHeads : kMostTileHeads;

  // Clusters, the largest cut into pieces that compute their scores again.
  struct Piece {
    std::int64_t representative;
    float slope;
    std::vector<TileTask::Head>* heads;
  };
  std::vector<std::vector<TileTask::Head>*> pieces_of(shape_.heads, nullptr);
  std::vector<Piece> pieces;
  for (std::int64_t h = 0; h < shape_.heads; ++h) {
    const std::int64_t representative = row.head_map[h];
    std::vector<TileTask::Head>*& heads = pieces_of[representative];
    if (heads == nullptr || static_cast<std::int64_t>(heads->size()) == most_heads) {
      heads = &tile_heads_.emplace_back();
      pieces.push_back({representative, slope(h), heads});
    }
    heads->push_back({values_of(call_, row, h / group), target(row, h)});
  }

  // Few tasks and a long cache: the keys are split too.
  const std::int64_t tasks = static_cast<std::int64_t>(pieces.size()) * blocks;
  const std::int64_t wanted_parts = divide_up(wanted_tasks, tasks);
  Range range{call_.first_visible(row.position()), row.end(), 0};
  range.part_length =
      std::max(kLeastTilePart, round_up(divide_up(range.end - range.first, wanted_parts), kPartUnit));
  const std::int64_t parts = range.parts();
  for (const Piece& piece : pieces) {
    if (parts > 1) {
      for (TileTask::Head& head : *piece.heads) split(row, &head.target, parts);
    }
    for (std::int64_t first = 0; first < row.tokens(); first += kMaxTileTokens) {
      TileTask task;
      task.common = &common_;
      task.query = query(row, piece.representative, row.exact + first);
      task.slope = piece.slope;
      task.keys = keys_of(call_, row, piece.representative / group);
      task.heads = piece.heads->data();
      task.num_heads = static_cast<std::int64_t>(piece.heads->size());
      task.tokens = std::min(kMaxTileTokens, row.tokens() - first);
      task.position = row.position() + first;
      task.first = first;
      const std::int64_t oldest = call_.first_visible(task.position), end = task.position + task.tokens;
      for (std::int64_t part = 0; part < parts; ++part) {
        task.begin = std::max(oldest, range.first + part * range.part_length);
        task.end = std::min(end, range.first + (part + 1) * range.part_length);
        task.part_offset = part * row.tokens();
        if (task.begin < task.end) tiles_.push_back(task);
      }
    }
  }
}

}  // namespace chai
