// Products with cache rows of floats: scores of queries, sums of weighted values.
#pragma once

#include "op/cpu/kernels.h"
#include "op/cpu/shared_rows.h"
#include "op/cpu/vector.h"

namespace chai {
namespace CHAI_ISA {

// One vector that meets contiguous rows is served best by one ascending stream: a step that touches several
// rows at a time costs a third of the bandwidth, software prefetch within the stream a sixth. Between pages,
// where the stream breaks off, prefetch pays (benchmarks/experiments.md).
constexpr int kRowsFromL1 = 8;  // rows per step of a weighted sum, where they are short
constexpr int kMostRegisters = kLanes == 16 ? 24 : 12;  // accumulators of one head's weighted sum

// The first bytes of the next block of rows; the machine finds the others by itself.
constexpr std::int64_t kAhead = 1024;

// Bring bytes that are read soon nearer; null: none.
CHAI_INLINE void prefetch(const char* from, std::int64_t bytes) {
  if (from == nullptr) return;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

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

// scores[q][t] = queries[q] · keys[t]
template <typename T>
void dots(const Queries& queries, const T* keys, std::int64_t rows, std::int64_t dim, float* scores,
          std::int64_t score_stride, const char* ahead) {
  if (queries.count == 1 && (sizeof(T) == sizeof(float) || ahead == nullptr)) {
    return dots_of_one(queries.first, keys, rows, dim, scores);
  }
  const std::int64_t vectors = dim / kLanes, tail = vectors * kLanes;
  for (std::int64_t t = 0; t < rows; t += kSharedRows) {
    const std::int64_t n = least(kSharedRows, rows - t);
    const FloatSource<T> source{keys + t * dim, dim};
    if (ahead != nullptr) prefetch(ahead + t * dim * sizeof(T), n * dim * sizeof(T));
    if (queries.count == 1) {
      dots_of_one(queries.first, keys + t * dim, n, dim, scores + t);
      continue;
    }
    for (std::int64_t first = 0; first < queries.count; first += kTileHeads) {
      const std::int64_t count = least(kTileHeads, queries.count - first);
      const float* query[kTileHeads];
      float* to[kTileHeads];
      for (std::int64_t i = 0; i < count; ++i) {
        query[i] = queries.first + (first + i) * queries.stride;
        to[i] = scores + (first + i) * score_stride + t;
      }
      tile_dots(query, count, source, n, vectors, to);
      for (std::int64_t i = 0; tail < dim && i < count; ++i) {
        for (std::int64_t r = 0; r < n; ++r) to[i][r] += dot_tail(query[i], keys + (t + r) * dim, tail, dim);
      }
    }
  }
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

// sums[i] += weights[i] · values
template <typename T>
void add(float* const* sums, const float* const* weights, std::int64_t count, const T* values,
         std::int64_t rows, std::int64_t dim, const char* ahead) {
  if (count == 1 && (sizeof(T) == sizeof(float) || ahead == nullptr)) {
    return weighted_sum(sums[0], values, weights[0], rows, dim);
  }
  const std::int64_t vectors = dim / kLanes;
  for (std::int64_t t = 0; t < rows; t += kSharedRows) {
    const std::int64_t n = least(kSharedRows, rows - t);
    const T* from = values + t * dim;
    if (ahead != nullptr) prefetch(ahead + t * dim * sizeof(T), n * dim * sizeof(T));
    if (count == 1) {
      weighted_sum(sums[0], from, weights[0] + t, n, dim);
      continue;
    }
    for (std::int64_t first = 0; first < count; first += kTileHeads) {
      const std::int64_t heads = least(kTileHeads, count - first);
      const float* weight[kTileHeads];
      for (std::int64_t i = 0; i < heads; ++i) weight[i] = weights[first + i] + t;
      tile_add(sums + first, weight, heads, FloatSource<T>{from, dim}, n, vectors);
      for (std::int64_t i = 0; vectors * kLanes < dim && i < heads; ++i) {
        for (std::int64_t r = 0; r < n; ++r) {
          for (std::int64_t d = vectors * kLanes; d < dim; ++d) {
            sums[first + i][d] += weight[i][r] * load_one(from + r * dim + d);
          }
        }
      }
    }
  }
}

// Rows in T as RowKernels.
template <typename T>
struct FloatRows {
  static const T* of(const RowBlock& block) { return reinterpret_cast<const T*>(block.rows); }

  static void dots(const Queries& queries, const RowBlock& block, std::int64_t dim, std::int64_t,
                   float* scores, std::int64_t score_stride, float*) {
    prefetch(block.ahead, kAhead);
    CHAI_ISA::dots(queries, of(block), block.count, dim, scores, score_stride, block.ahead);
  }
  static void add(float* const* sums, const float* const* weights, std::int64_t count, const RowBlock& block,
                  std::int64_t dim, std::int64_t, float*) {
    prefetch(block.ahead, kAhead);
    CHAI_ISA::add(sums, weights, count, of(block), block.count, dim, block.ahead);
  }
  static void load(float* to, const RowBlock& block, std::int64_t dim, std::int64_t) {
    widen(to, of(block), block.count * dim, 1.0f);
  }
  static void store(const RowBlock& block, const float* from, std::int64_t dim, std::int64_t) {
    narrow(reinterpret_cast<T*>(block.rows), from, block.count * dim, 1.0f);
  }
  static std::size_t scratch(std::int64_t, std::int64_t) { return 0; }

  static constexpr RowKernels kernels() { return {dots, add, load, store, scratch}; }
};

}  // namespace CHAI_ISA
}  // namespace chai
