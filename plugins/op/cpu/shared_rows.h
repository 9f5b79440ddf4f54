// Products of several vectors with the same rows, in tiles of registers: a row is read, and made floats, once
// for all vectors of a tile.
#pragma once

#include "op/cpu/vector.h"

namespace chai {
namespace CHAI_ISA {

constexpr int kSumsAtOnce = 4;                      // vectors that sums() adds up
constexpr int kTileHeads = kLanes == 16 ? 4 : 2;    // queries, or heads whose values are summed
constexpr int kTileColumns = kLanes == 16 ? 4 : 2;  // vectors of a row
constexpr std::int64_t kSharedRows = 16;            // rows that stay in L1 from tile to tile

// Rows of floats of type T. What a source of rows offers: at(t).vector(j), vector j of row t.
template <typename T>
struct FloatSource {
  const T* rows;
  std::int64_t dim;

  struct Row {
    const T* from;
    CHAI_INLINE Vec vector(std::int64_t j) const { return load(from + j * kLanes); }
  };
  CHAI_INLINE Row at(std::int64_t t) const { return {rows + t * dim}; }
};

// scores[q][t] = queries[q] · row t, of whole vectors.
template <int QUERIES, typename Source>
void dots_of_tile(const float* const* queries, const Source& source, std::int64_t rows, std::int64_t vectors,
                  float* const* scores) {
  for (std::int64_t t = 0; t < rows; t += kSumsAtOnce) {
    // Past the last row that row again.
    const auto row0 = source.at(t), row1 = source.at(least(t + 1, rows - 1)),
               row2 = source.at(least(t + 2, rows - 1)), row3 = source.at(least(t + 3, rows - 1));
    Vec lanes[QUERIES][kSumsAtOnce] = {};
    for (std::int64_t j = 0; j < vectors; ++j) {
      const Vec x[kSumsAtOnce] = {row0.vector(j), row1.vector(j), row2.vector(j), row3.vector(j)};
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) {
        const Vec query = load(queries[q] + j * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kSumsAtOnce; ++r) lanes[q][r] += query * x[r];
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const Quad total = sums(lanes[q][0], lanes[q][1], lanes[q][2], lanes[q][3]);
      if (t + kSumsAtOnce <= rows) {
        store_four(scores[q] + t, total);
      } else {
        for (std::int64_t r = 0; r < rows - t; ++r) scores[q][t + r] = total[r];
      }
    }
  }
}

template <int HEADS, int COLUMNS, typename Source>
CHAI_INLINE void add_columns_of_tile(float* const* sums, const float* const* weights, const Source& source,
                                     std::int64_t rows, std::int64_t first) {
  Vec total[HEADS][COLUMNS];
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) total[h][c] = load(sums[h] + (first + c) * kLanes);
  }
  for (std::int64_t t = 0; t < rows; ++t) {
    const auto row = source.at(t);
    Vec x[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) x[c] = row.vector(first + c);
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h) {
      const Vec weight = splat(weights[h][t]);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) total[h][c] += weight * x[c];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) store(sums[h] + (first + c) * kLanes, total[h][c]);
  }
}

// sums[h] += Σ_t weights[h][t] · row t, of whole vectors.
template <int HEADS, typename Source>
void add_of_tile(float* const* sums, const float* const* weights, const Source& source, std::int64_t rows,
                 std::int64_t vectors) {
  std::int64_t j = 0;
  for (; j + kTileColumns <= vectors; j += kTileColumns) {
    add_columns_of_tile<HEADS, kTileColumns>(sums, weights, source, rows, j);
  }
  for (; j < vectors; ++j) add_columns_of_tile<HEADS, 1>(sums, weights, source, rows, j);
}

// As above for 1 to kTileHeads queries or heads.
template <typename Source>
void tile_dots(const float* const* queries, std::int64_t count, const Source& source, std::int64_t rows,
               std::int64_t vectors, float* const* scores) {
  if (count == 1) return dots_of_tile<1>(queries, source, rows, vectors, scores);
  if (count == 2) return dots_of_tile<2>(queries, source, rows, vectors, scores);
#if CHAI_LANES == 16
  if (count == 3) return dots_of_tile<3>(queries, source, rows, vectors, scores);
  return dots_of_tile<4>(queries, source, rows, vectors, scores);
#endif
}

template <typename Source>
void tile_add(float* const* sums, const float* const* weights, std::int64_t count, const Source& source,
              std::int64_t rows, std::int64_t vectors) {
  if (count == 1) return add_of_tile<1>(sums, weights, source, rows, vectors);
  if (count == 2) return add_of_tile<2>(sums, weights, source, rows, vectors);
#if CHAI_LANES == 16
  if (count == 3) return add_of_tile<3>(sums, weights, source, rows, vectors);
  return add_of_tile<4>(sums, weights, source, rows, vectors);
#endif
}

}  // namespace CHAI_ISA
}  // namespace chai
