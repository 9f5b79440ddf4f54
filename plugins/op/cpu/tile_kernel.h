// Prefill: a block of queries of one representative against a long range of the cache. Bound by arithmetic.
//
// Queries lie across the lanes of a vector. A block of scores is [key][query], so that max, exp and sum run
// along keys without any shuffle, keys are read as they lie in the cache, one broadcast at a time, and the
// weights are broadcast again for the product with the values. The block's weights are computed once and
// used for every value head of the cluster; the accumulators of all of them stay in the core's cache.
#pragma once

#include "kernels.h"
#include "vector.h"

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
  float* keys;     // [kKeyBlock][key_dim], used when the cache is not float32
  float* values;   // [panel][kPanelStride]: [kKeyBlock][kPanel] each
  float* sums;     // [head][kMaxTileTokens][columns]
  float* max;      // [kMaxTileTokens]
  float* sum;      // [kMaxTileTokens]
  float* rescale;  // [kMaxTileTokens], what the block's new maximum multiplies older sums by
  std::int64_t columns;

  static constexpr std::int64_t kWeights = (kKeyBlock + kKeyRows) * kGroup;

  static std::size_t size(const TileTask& task) {
    const std::int64_t columns = round_up(task.value_dim, kPanel);
    return task.key_dim * (kMaxTileTokens + kKeyBlock) + kGroups * kWeights +
           columns / kPanel * kPanelStride + task.num_heads * kMaxTileTokens * columns + 3 * kMaxTileTokens +
           64;
  }

  TileScratch(const TileTask& task, float* memory) : columns(round_up(task.value_dim, kPanel)) {
    weights = memory;
    values = weights + kGroups * kWeights;
    sums = values + columns / kPanel * kPanelStride;
    max = sums + task.num_heads * kMaxTileTokens * columns;
    sum = max + kMaxTileTokens;
    rescale = sum + kMaxTileTokens;
    queries = rescale + kMaxTileTokens;
    keys = queries + kMaxTileTokens * task.key_dim;
  }
};

template <typename T>
void pack_queries(const TileTask& task, float* packed) {
  const T* query = static_cast<const T*>(task.query);
  for (std::int64_t first = 0; first < task.tokens; first += kGroup) {
    for (std::int64_t lane = 0; lane < kGroup; ++lane) {
      float* to = packed + first * task.key_dim + lane;
      const std::int64_t token = first + lane;
      for (std::int64_t d = 0; d < task.key_dim; ++d) {
        to[d * kGroup] = token < task.tokens ? load_one(query + token * task.key_dim + d) * task.scale : 0.0f;
      }
    }
  }
}

CHAI_INLINE const float* key_rows(const float* cache, std::int64_t, std::int64_t, float*) {
  return cache;
}

template <typename T>
CHAI_INLINE const float* key_rows(const T* cache, std::int64_t rows, std::int64_t dim, float* widened) {
  widen(widened, cache, rows * dim, 1.0f);
  return widened;
}

// Columns in panels of kPanel, so that the product reads them in order; columns past value_dim are zero.
// Row by row, since the cache is read fastest in one ascending stream.
template <typename T>
void pack_values(const T* cache, std::int64_t rows, std::int64_t dim, float* packed) {
  for (std::int64_t r = 0; r < rows; ++r, cache += dim, packed += kPanel) {
    float* to = packed;
    std::int64_t column = 0;
    for (; column + kPanel <= dim; column += kPanel, to += kPanelStride) {
#pragma GCC unroll 2
      for (int v = 0; v < kValueVectors; ++v) store(to + v * kLanes, load(cache + column + v * kLanes));
    }
    for (std::int64_t v = 0; column < dim && v < kPanel; ++v) {
      to[v] = column + v < dim ? load_one(cache + column + v) : 0.0f;
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

// Scores of a block become weights. Query `lane` sees the first visible + lane keys of the block (visible
// may be 0 or less); the block has `rows` keys that any query of the group sees.
CHAI_INLINE void soften_block(float* scores, std::int64_t rows, std::int64_t visible, float* max, float* sum,
                              float* rescale) {
  const std::int64_t open = most(0, least(rows, visible));  // keys before this one are seen by every query
  Vec best[kQueryVectors], limit[kQueryVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kQueryVectors; ++v) {
    best[v] = load(max + v * kLanes);
    limit[v] = lane_numbers() + static_cast<float>(visible + v * kLanes);
  }
  for (std::int64_t k = 0; k < open; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) best[v] = larger(load(scores + k * kGroup + v * kLanes), best[v]);
  }
  for (std::int64_t k = open; k < rows; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) {
      const Vec score = load(scores + k * kGroup + v * kLanes);
      best[v] = splat(static_cast<float>(k)) < limit[v] ? larger(score, best[v]) : best[v];
    }
  }
  Vec total[kQueryVectors];
#pragma GCC unroll 3
  for (int v = 0; v < kQueryVectors; ++v) {
    const Vec factor = exp2_nonpositive(load(max + v * kLanes) - best[v]);
    store(rescale + v * kLanes, factor);
    store(max + v * kLanes, best[v]);
    total[v] = load(sum + v * kLanes) * factor;
  }
  for (std::int64_t k = 0; k < open; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) {
      float* at = scores + k * kGroup + v * kLanes;
      const Vec weight = exp2_nonpositive(load(at) - best[v]);
      store(at, weight);
      total[v] += weight;
    }
  }
  for (std::int64_t k = open; k < rows; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kQueryVectors; ++v) {
      float* at = scores + k * kGroup + v * kLanes;
      const Vec seen = exp2_nonpositive(load(at) - best[v]);
      const Vec weight = splat(static_cast<float>(k)) < limit[v] ? seen : Vec{};
      store(at, weight);
      total[v] += weight;
    }
  }
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
template <typename T>
void tile_weights(const TileTask& task, std::int64_t first, std::int64_t rows, const TileScratch& scratch) {
  const T* cache = static_cast<const T*>(task.keys) + first * task.key_dim;
  const float* keys = key_rows(cache, rows, task.key_dim, scratch.keys);
  for (std::int64_t token = 0; token < task.tokens; token += kGroup) {
    const std::int64_t last = least(token + kGroup, task.tokens) - 1;
    const std::int64_t seen = least(rows, visible_keys(task, first, last));
    float* weights = scratch.weights + token / kGroup * TileScratch::kWeights;
    for (std::int64_t k = 0; k < seen; k += kKeyRows) {
      score_tile(scratch.queries + token * task.key_dim, keys + k * task.key_dim, rows - k, task.key_dim,
                 weights + k * kGroup);
    }
    if (seen > 0) {
      soften_block(weights, seen, visible_keys(task, first, token), scratch.max + token, scratch.sum + token,
                   scratch.rescale + token);
    } else {
      for (std::int64_t lane = 0; lane < kGroup; ++lane) scratch.rescale[token + lane] = 1.0f;
    }
  }
}

// One value head's share of a block of keys.
template <typename T>
void tile_values(const TileTask& task, std::int64_t head, std::int64_t first, std::int64_t rows,
                 const TileScratch& scratch) {
  const T* cache = static_cast<const T*>(task.heads[head].values) + first * task.value_dim;
  pack_values(cache, rows, task.value_dim, scratch.values);
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

template <typename T>
void tile_finish(const TileTask& task, std::int64_t head, const TileScratch& scratch) {
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
      __builtin_memcpy(target.partial + at * task.value_dim, sums, task.value_dim * sizeof(float));
    } else {
      narrow(static_cast<T*>(target.output) + (task.first + token) * task.output_stride, sums, task.value_dim,
             state.inverse_sum());
    }
  }
}

template <typename T>
void tile(const TileTask& task, float* memory) {
  const TileScratch scratch(task, memory);
  pack_queries<T>(task, scratch.queries);
  for (std::int64_t token = 0; token < kMaxTileTokens; ++token) {
    scratch.max[token] = -FLT_MAX;
    scratch.sum[token] = 0.0f;
  }
  __builtin_memset(scratch.sums, 0, task.num_heads * kMaxTileTokens * scratch.columns * sizeof(float));
  for (std::int64_t first = task.begin; first < task.end; first += kKeyBlock) {
    const std::int64_t rows = least(kKeyBlock, task.end - first);
    tile_weights<T>(task, first, rows, scratch);
    for (std::int64_t head = 0; head < task.num_heads; ++head)
      tile_values<T>(task, head, first, rows, scratch);
  }
  for (std::int64_t head = 0; head < task.num_heads; ++head) tile_finish<T>(task, head, scratch);
}

}  // namespace CHAI_ISA
}  // namespace chai
