// Prefill: a block of queries of one representative against a long range of the cache. Bound by arithmetic.
//
// Queries lie across the lanes of a vector. A block of scores is [key][query], so that max, exp and sum run
// along keys without any shuffle, keys are read as they lie in the cache, one broadcast at a time, and the
// weights are broadcast again for the product with the values. The block's weights are computed once and
// used for every value head of the cluster; the accumulators of all of them stay in the core's cache.
#pragma once

#include "op/cpu/kernels.h"
#include "op/cpu/row_kernels.h"
#include "op/cpu/vector.h"

namespace chai {
namespace CHAI_ISA {

// Register tiles: (key rows × 3 vectors of queries) and (query rows × 2 vectors of values); 12 accumulators
// of 16 registers, 24 of 32.
constexpr int kKeyRows = kLanes == 16 ? 8 : 4;
constexpr int kQueryVectors = 3;
constexpr int kQueryRows = kLanes == 16 ? 12 : 6;
constexpr int kValueVectors = 2;
constexpr std::int64_t kGroup = kQueryVectors * kLanes;  // queries of one register tile
constexpr std::int64_t kPanel = kValueVectors * kLanes;  // value columns of one register tile
constexpr std::int64_t kKeyBlock = 256;                  // keys whose scores are held at once
// A panel of packed values. Not a multiple of 4 KiB: rows of all panels are written together, and must not
// fall into the same set of the L1 cache.
constexpr std::int64_t kPanelStride = kKeyBlock * kPanel + kPanel;
constexpr std::int64_t kGroups = kMaxTileTokens / kGroup;
static_assert(kMaxTileTokens % kGroup == 0 && kGroup % kQueryRows == 0, "tiles must fit each other");

struct TileScratch {
  float* queries;  // [group][key_dim][kGroup], scaled
  float* weights;  // [group][kKeyBlock + kKeyRows][kGroup], scores first
  float* rows;     // [kKeyBlock][key_dim], then [kKeyBlock][value_dim]: the block's rows as floats
  float* values;   // [panel][kPanelStride]: [kKeyBlock][kPanel] each
  float* sums;     // [head][kMaxTileTokens][columns]
  float* max;      // [kMaxTileTokens]
  float* sum;      // [kMaxTileTokens]
  float* rescale;  // [kMaxTileTokens], what the block's new maximum multiplies older sums by
  std::int64_t columns;

  static constexpr std::int64_t kWeights = (kKeyBlock + kKeyRows) * kGroup;

  static std::size_t size(const TileTask& task) {
    const Common& common = *task.common;
    const std::int64_t columns = round_up(common.value_dim, kPanel);
    return common.key_dim * kMaxTileTokens + kKeyBlock * most(common.key_dim, common.value_dim) +
           kGroups * kWeights + columns / kPanel * kPanelStride + task.num_heads * kMaxTileTokens * columns +
           3 * kMaxTileTokens + 64;
  }

  TileScratch(const TileTask& task, float* memory) : columns(round_up(task.common->value_dim, kPanel)) {
    weights = memory;
    values = weights + kGroups * kWeights;
    sums = values + columns / kPanel * kPanelStride;
    max = sums + task.num_heads * kMaxTileTokens * columns;
    sum = max + kMaxTileTokens;
    rescale = sum + kMaxTileTokens;
    queries = rescale + kMaxTileTokens;
    rows = queries + kMaxTileTokens * task.common->key_dim;
  }
};

inline void pack_queries(const TileTask& task, float* row, float* packed) {
  const Common& common = *task.common;
  const std::int64_t dim = common.key_dim;
  for (std::int64_t token = 0; token < round_up(task.tokens, kGroup); ++token) {
    if (token < task.tokens) {
      const auto* query = static_cast<const char*>(task.query) + token * dim * common.element->size;
      common.element->widen(row, query, dim, common.scale);
    } else {
      __builtin_memset(row, 0, dim * sizeof(float));
    }
    float* to = packed + token / kGroup * kGroup * dim + token % kGroup;
    for (std::int64_t d = 0; d < dim; ++d) to[d * kGroup] = row[d];
  }
}

// Positions [first, first + count) as floats. A block of float32 that lies in one page is used where it is.
inline const float* float_rows(const PagedRows& paged, const RowKernels& kernel, std::int64_t first,
                               std::int64_t count, std::int64_t dim, std::int64_t group, float* to) {
  const RowBlock block = paged.block(first, first + count);
  if (block.count == count && &kernel == &kFloat32Rows) return reinterpret_cast<const float*>(block.rows);
  for_each_block(paged, first, first + count, [&](const RowBlock& rows, std::int64_t position) {
    kernel.load(to + (position - first) * dim, rows, dim, group);
  });
  return to;
}

// Columns in panels of kPanel, so that the product reads them in order; columns past value_dim are zero.
// Row by row, since the cache is read fastest in one ascending stream.
inline void pack_values(const float* values, std::int64_t rows, std::int64_t dim, float* packed) {
  for (std::int64_t r = 0; r < rows; ++r, values += dim, packed += kPanel) {
    float* to = packed;
    std::int64_t column = 0;
    for (; column + kPanel <= dim; column += kPanel, to += kPanelStride) {
#pragma GCC unroll 2
      for (int v = 0; v < kValueVectors; ++v) store(to + v * kLanes, load(values + column + v * kLanes));
    }
    for (std::int64_t v = 0; column < dim && v < kPanel; ++v) {
      to[v] = column + v < dim ? values[column + v] : 0.0f;
    }
  }
}

// scores[key][query] of kKeyRows keys and one group of queries. Rows past the last are that row again.
CHAI_INLINE void score_tile(const float* queries, const float* keys, std::int64_t rows, std::int64_t dim,
                            float* scores) {
  const float* row[kKeyRows];
#pragma GCC unroll 8
  for (int r = 0; r < kKeyRows; ++r) row[r] = keys + least(r, rows - 1) * dim;
  Vec total[kKeyRows][kQueryVectors] = {};
  for (std::int64_t d = 0; d < dim; ++d) {
    Vec q[kQueryVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) q[v] = load(queries + d * kGroup + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kKeyRows; ++r) {
      const Vec k = splat(row[r][d]);
#pragma GCC unroll 3
      for (int v = 0; v < kQueryVectors; ++v) total[r][v] += k * q[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kKeyRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) store(scores + r * kGroup + v * kLanes, total[r][v]);
  }
}

// The soft cap and the slope on a block of scores. `distance` is the first key's position less the first
// query's.
inline void add_block_terms(float* scores, std::int64_t rows, float softcap, float slope, float distance) {
  const float inverse = softcap == 0.0f ? 0.0f : 1.0f / softcap;
  for (std::int64_t k = 0; k < rows; ++k) {
    for (int v = 0; v < kQueryVectors; ++v) {
      float* at = scores + k * kGroup + v * kLanes;
      Vec score = load(at);
      if (softcap != 0.0f) score = tanh_of(score * inverse) * softcap;
      const Vec ahead = static_cast<float>(k) + distance - (lane_numbers() + static_cast<float>(v * kLanes));
      store(at, score + ahead * slope);
    }
  }
}

// Which keys of a block the queries of a group see: query `lane` those from oldest + lane (at least 0) up to,
// but not including, visible + lane. Both may be negative.
struct Visible {
  std::int64_t oldest, visible;

  // Keys [first_open, open) are seen by every query.
  CHAI_INLINE std::int64_t first_open(std::int64_t rows) const {
    return most(0, least(rows, oldest + kGroup - 1));
  }
  CHAI_INLINE std::int64_t open(std::int64_t rows) const {
    return most(first_open(rows), least(rows, visible));
  }
};

// Scores of a block become weights. The block has `rows` keys that any query of the group may see.
CHAI_INLINE void soften_block(float* scores, std::int64_t rows, const Visible& range, float* max, float* sum,
                              float* rescale) {
  const std::int64_t first_open = range.first_open(rows), open = range.open(rows);
  Vec best[kQueryVectors], oldest[kQueryVectors], limit[kQueryVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kQueryVectors; ++v) {
    best[v] = load(max + v * kLanes);
    oldest[v] = lane_numbers() + static_cast<float>(range.oldest + v * kLanes);
    limit[v] = lane_numbers() + static_cast<float>(range.visible + v * kLanes);
  }
  const auto sees = [&](std::int64_t k, int v) {
    const Vec key = splat(static_cast<float>(k));
    return (key >= oldest[v]) & (key < limit[v]);
  };
  const auto raise = [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t k = from; k < to; ++k) {
#pragma GCC unroll 3
      for (int v = 0; v < kQueryVectors; ++v) {
        const Vec score = load(scores + k * kGroup + v * kLanes);
        best[v] = sees(k, v) ? larger(score, best[v]) : best[v];
      }
    }
  };
  raise(0, first_open);
  for (std::int64_t k = first_open; k < open; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) best[v] = larger(load(scores + k * kGroup + v * kLanes), best[v]);
  }
  raise(open, rows);
  Vec total[kQueryVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kQueryVectors; ++v) {
    const Vec factor = exp2_nonpositive(load(max + v * kLanes) - best[v]);
    store(rescale + v * kLanes, factor);
    store(max + v * kLanes, best[v]);
    total[v] = load(sum + v * kLanes) * factor;
  }
  const auto weigh = [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t k = from; k < to; ++k) {
#pragma GCC unroll 3
      for (int v = 0; v < kQueryVectors; ++v) {
        float* at = scores + k * kGroup + v * kLanes;
        const Vec seen = exp2_nonpositive(load(at) - best[v]);
        const Vec weight = sees(k, v) ? seen : Vec{};
        store(at, weight);
        total[v] += weight;
      }
    }
  };
  weigh(0, first_open);
  for (std::int64_t k = first_open; k < open; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) {
      float* at = scores + k * kGroup + v * kLanes;
      const Vec weight = exp2_nonpositive(load(at) - best[v]);
      store(at, weight);
      total[v] += weight;
    }
  }
  weigh(open, rows);
#pragma GCC unroll 3
  for (int v = 0; v < kQueryVectors; ++v) store(sum + v * kLanes, total[v]);
}

// sums[query][column] = sums * rescale + weights · values for ROWS queries and one panel of columns.
template <int ROWS>
CHAI_INLINE void value_tile(const float* weights, const float* values, std::int64_t keys,
                            const float* rescale, float* sums, std::int64_t columns) {
  Vec total[ROWS][kValueVectors];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kValueVectors; ++v) {
      total[r][v] = load(sums + r * columns + v * kLanes) * splat(rescale[r]);
    }
  }
  for (std::int64_t k = 0; k < keys; ++k) {
    Vec x[kValueVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kValueVectors; ++v) x[v] = load(values + k * kPanel + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Vec weight = splat(weights[k * kGroup + r]);
#pragma GCC unroll 2
      for (int v = 0; v < kValueVectors; ++v) total[r][v] += weight * x[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kValueVectors; ++v) store(sums + r * columns + v * kLanes, total[r][v]);
  }
}

// How many keys of a block that starts at `first` the task's query `token` sees.
CHAI_INLINE std::int64_t visible_keys(const TileTask& task, std::int64_t first, std::int64_t token) {
  return task.position + token + 1 - first;
}

// Weights of one block of keys for all groups of queries.
inline void tile_weights(const TileTask& task, std::int64_t first, std::int64_t rows,
                         const TileScratch& scratch) {
  const Common& common = *task.common;
  const std::int64_t dim = common.key_dim;
  const float* keys = float_rows(task.keys, *common.keys, first, rows, dim, common.group, scratch.rows);
  for (std::int64_t token = 0; token < task.tokens; token += kGroup) {
    const std::int64_t last = least(token + kGroup, task.tokens) - 1;
    const std::int64_t seen = least(rows, visible_keys(task, first, last));
    const std::int64_t visible = visible_keys(task, first, token);
    const Visible range{common.window > 0 ? visible - common.window : -first - kGroup, visible};
    float* weights = scratch.weights + token / kGroup * TileScratch::kWeights;
    if (seen <= 0) {
      for (std::int64_t lane = 0; lane < kGroup; ++lane) scratch.rescale[token + lane] = 1.0f;
      continue;
    }
    for (std::int64_t k = 0; k < seen; k += kKeyRows) {
      score_tile(scratch.queries + token * dim, keys + k * dim, rows - k, dim, weights + k * kGroup);
    }
    if (common.softcap != 0.0f || task.slope != 0.0f) {
      add_block_terms(weights, seen, common.softcap, task.slope,
                      static_cast<float>(first - task.position - token));
    }
    soften_block(weights, seen, range, scratch.max + token, scratch.sum + token, scratch.rescale + token);
  }
}

// One value head's share of a block of keys.
inline void tile_values(const TileTask& task, std::int64_t head, std::int64_t first, std::int64_t rows,
                        const TileScratch& scratch) {
  const Common& common = *task.common;
  const float* from = float_rows(task.heads[head].values, *common.values, first, rows, common.value_dim,
                                 common.group, scratch.rows);
  pack_values(from, rows, common.value_dim, scratch.values);
  float* head_sums = scratch.sums + head * kMaxTileTokens * scratch.columns;
  for (std::int64_t column = 0; column < scratch.columns; column += kPanel) {
    const float* values = scratch.values + column / kPanel * kPanelStride;
    for (std::int64_t token = 0; token < task.tokens; token += kQueryRows) {
      const std::int64_t last = least(token + kQueryRows, task.tokens) - 1;
      const std::int64_t seen = least(rows, visible_keys(task, first, last));
      if (seen <= 0) continue;
      const float* weights = scratch.weights + token / kGroup * TileScratch::kWeights + token % kGroup;
      value_tile<kQueryRows>(weights, values, seen, scratch.rescale + token,
                             head_sums + token * scratch.columns + column, scratch.columns);
    }
  }
}

inline void tile_finish(const TileTask& task, std::int64_t head, const TileScratch& scratch) {
  const Common& common = *task.common;
  const Target& target = task.heads[head].target;
  const float* head_sums = scratch.sums + head * kMaxTileTokens * scratch.columns;
  for (std::int64_t token = 0; token < task.tokens; ++token) {
    SoftmaxState state;
    state.max = scratch.max[token];
    state.sum = scratch.sum[token];
    const float* sums = head_sums + token * scratch.columns;
    if (target.partial) {
      const std::int64_t at = task.part_offset + task.first + token;
      target.state[at] = state;
      __builtin_memcpy(target.partial + at * common.value_dim, sums, common.value_dim * sizeof(float));
    } else {
      auto* to = static_cast<char*>(target.output) +
                 (task.first + token) * common.output_stride * common.element->size;
      common.element->narrow(to, sums, common.value_dim, state.weight_beside(target.sink));
    }
  }
}

inline void tile(const TileTask& task, float* memory) {
  const TileScratch scratch(task, memory);
  pack_queries(task, scratch.rows, scratch.queries);
  for (std::int64_t token = 0; token < kMaxTileTokens; ++token) {
    scratch.max[token] = -FLT_MAX;
    scratch.sum[token] = 0.0f;
  }
  __builtin_memset(scratch.sums, 0, task.num_heads * kMaxTileTokens * scratch.columns * sizeof(float));
  for (std::int64_t first = task.begin; first < task.end; first += kKeyBlock) {
    const std::int64_t rows = least(kKeyBlock, task.end - first);
    tile_weights(task, first, rows, scratch);
    for (std::int64_t head = 0; head < task.num_heads; ++head) tile_values(task, head, first, rows, scratch);
  }
  for (std::int64_t head = 0; head < task.num_heads; ++head) tile_finish(task, head, scratch);
}

}  // namespace CHAI_ISA
}  // namespace chai
