// Products with cache rows of codes, which are used as they are read: by one vector for each row (decode of
// multi-head attention), or by several in tiles of registers (shared_rows.h). Only groups that do not fill
// vectors of codes become floats in L1 first.
#pragma once

#include "op/cpu/float_rows.h"

namespace chai {
namespace CHAI_ISA {

constexpr std::int64_t kScaleRows = 64;  // rows whose scales are floats at one time
constexpr int kColumnVectors = 8;        // accumulators of one pass over the columns

// What Codes must offer, all for rows of `dim` elements in groups of `group`; PER is the number of vectors of
// bytes in a group, GROUPS that of groups in a row or 0 for any:
//   bytes(n)                 bytes of n elements
//   Query, dot<PER, GROUPS>  a query in the order of the codes; lanes whose sum is query · row
//   Sum, add_rows<PER>       sums in the order of the codes; += factors · codes of some rows
//   Source<PER>              rows as floats for tiles, in an order of its own
//   in_order, sums_in_order, add_in_order   queries and sums in that order, and back
//   load, store              whole rows
template <typename Codes>
struct QuantisedRows {
  // Vectors of bytes in a group if they fill it exactly and few enough; 0: rows go through floats.
  static std::int64_t vectors(std::int64_t group) {
    const std::int64_t bytes = Codes::bytes(group), per = bytes / kLanes;
    const bool fits = bytes % kLanes == 0 && (per == 1 || per == 2 || per == 4 || per == 8);
    return fits && per <= Codes::kMostVectors ? per : 0;
  }

  static RowBlock part(const RowBlock& block, std::int64_t first, std::int64_t most_rows, std::int64_t dim,
                       std::int64_t group) {
    const std::int64_t bytes = Codes::bytes(dim), scales = row_scales(Codes::kStorage, dim, group);
    return {block.rows + first * bytes, block.scales + first * scales, least(most_rows, block.count - first),
            block.ahead == nullptr ? nullptr : block.ahead + first * bytes,
            block.scales_ahead == nullptr ? nullptr : block.scales_ahead + 2 * first * scales};
  }

  static const float* scales_of(const RowBlock& block, std::int64_t numbers, float* to) {
    prefetch(block.scales_ahead, 2 * block.count * numbers);
    widen(to, reinterpret_cast<const Float16*>(block.scales), block.count * numbers, 1.0f);
    return to;
  }

  static std::size_t scratch(std::int64_t dim, std::int64_t group) {
    const std::int64_t direct =
        2 * kScaleRows * row_scales(Codes::kStorage, dim, group) + (kTileHeads + 1) * dim + 4 * kLanes;
    return most(direct, kSharedRows * dim);
  }

  template <int PER, int GROUPS>
  static void direct_dots(const float* query, const RowBlock& block, std::int64_t dim, std::int64_t group,
                          float* scores, float* scratch) {
    const std::int64_t groups = dim / group, numbers = row_scales(Codes::kStorage, dim, group);
    const typename Codes::Query prepared(query, dim, group, scratch + kScaleRows * numbers);
    for (std::int64_t first = 0; first < block.count; first += kScaleRows) {
      const RowBlock rows = part(block, first, kScaleRows, dim, group);
      const float* scales = scales_of(rows, numbers, scratch);
      const auto* codes = reinterpret_cast<const typename Codes::Byte*>(rows.rows);
      float* to = scores + first;
      const std::int64_t bytes = Codes::bytes(dim);
      std::int64_t t = 0;
      for (; t + kSumsAtOnce <= rows.count; t += kSumsAtOnce) {
        if (rows.ahead != nullptr) prefetch(rows.ahead + t * bytes, kSumsAtOnce * bytes);
        Vec lanes[kSumsAtOnce];
#pragma GCC unroll 4
        for (int r = 0; r < kSumsAtOnce; ++r) {
          lanes[r] = Codes::template dot<PER, GROUPS>(prepared, codes + (t + r) * bytes,
                                                      scales + (t + r) * numbers, groups);
        }
        const Quad total = sums(lanes[0], lanes[1], lanes[2], lanes[3]);
        __builtin_memcpy(to + t, &total, sizeof(total));
      }
      for (; t < rows.count; ++t) {
        to[t] =
            sum(Codes::template dot<PER, GROUPS>(prepared, codes + t * bytes, scales + t * numbers, groups));
      }
    }
  }

  // Rows of two or four groups, which those of today's models are, without a loop over groups.
  template <int PER>
  static void direct_dots(const float* query, const RowBlock& block, std::int64_t dim, std::int64_t group,
                          float* scores, float* scratch) {
    if (dim == 4 * group) return direct_dots<PER, 4>(query, block, dim, group, scores, scratch);
    if (dim == 2 * group) return direct_dots<PER, 2>(query, block, dim, group, scores, scratch);
    direct_dots<PER, 0>(query, block, dim, group, scores, scratch);
  }

  template <int PER>
  static void shared_dots(const Queries& queries, const RowBlock& block, std::int64_t dim, std::int64_t group,
                          float* scores, std::int64_t score_stride, float* scratch) {
    const std::int64_t numbers = row_scales(Codes::kStorage, dim, group), bytes = Codes::bytes(dim);
    float* const own = scratch + kScaleRows * numbers;
    for (std::int64_t first = 0; first < block.count; first += kScaleRows) {
      const RowBlock rows = part(block, first, kScaleRows, dim, group);
      prefetch(rows.ahead, rows.count * bytes);
      const typename Codes::template Source<PER> source{
          reinterpret_cast<const typename Codes::Byte*>(rows.rows), scales_of(rows, numbers, scratch), dim,
          dim / group};
      for (std::int64_t i = 0; i < queries.count; i += kTileHeads) {
        const std::int64_t count = least(kTileHeads, queries.count - i);
        const float* query[kTileHeads];
        float* to[kTileHeads];
        for (std::int64_t q = 0; q < count; ++q) {
          query[q] = Codes::in_order(own + q * dim, queries.first + (i + q) * queries.stride, dim);
          to[q] = scores + (i + q) * score_stride + first;
        }
        tile_dots(query, count, source, rows.count, dim / kLanes, to);
      }
    }
  }

  static void dots(const Queries& queries, const RowBlock& block, std::int64_t dim, std::int64_t group,
                   float* scores, std::int64_t score_stride, float* scratch) {
    const std::int64_t per = vectors(group);
    if (queries.count == 1) {
      if (per == 8) return direct_dots<8>(queries.first, block, dim, group, scores, scratch);
      if (per == 4) return direct_dots<4>(queries.first, block, dim, group, scores, scratch);
      if (per == 2) return direct_dots<2>(queries.first, block, dim, group, scores, scratch);
      if (per == 1) return direct_dots<1>(queries.first, block, dim, group, scores, scratch);
    } else {
      if (per == 8) return shared_dots<8>(queries, block, dim, group, scores, score_stride, scratch);
      if (per == 4) return shared_dots<4>(queries, block, dim, group, scores, score_stride, scratch);
      if (per == 2) return shared_dots<2>(queries, block, dim, group, scores, score_stride, scratch);
      if (per == 1) return shared_dots<1>(queries, block, dim, group, scores, score_stride, scratch);
    }
    for (std::int64_t first = 0; first < block.count; first += kSharedRows) {
      const RowBlock rows = part(block, first, kSharedRows, dim, group);
      Codes::load(scratch, rows, dim, group);
      CHAI_ISA::dots<float>(queries, scratch, rows.count, dim, scores + first, score_stride, nullptr);
    }
  }

  template <int PER>
  static void direct_add(float* sums, const float* weights, const RowBlock& block, std::int64_t dim,
                         std::int64_t group, float* scratch) {
    const std::int64_t numbers = row_scales(Codes::kStorage, dim, group), groups = dim / group;
    float* factors = scratch + kScaleRows * numbers;
    typename Codes::Sum sum(dim, group, factors + kScaleRows * numbers);
    for (std::int64_t first = 0; first < block.count; first += kScaleRows) {
      const RowBlock rows = part(block, first, kScaleRows, dim, group);
      const float* scales = scales_of(rows, numbers, scratch);
      for (std::int64_t t = 0; t < rows.count; ++t) {
        const float weight = weights[first + t];
        std::int64_t i = t * numbers;
        for (; i + 4 <= (t + 1) * numbers; i += 4) store_four(factors + i, load_four(scales + i) * weight);
        for (; i < (t + 1) * numbers; ++i) factors[i] = scales[i] * weight;
      }
      const auto* codes = reinterpret_cast<const typename Codes::Byte*>(rows.rows);
      Codes::template add_rows<PER>(sum.target(sums), codes, factors, rows.count, dim, groups, rows.ahead);
      sum.add_offsets(factors, rows.count, groups);
    }
    sum.finish(sums, dim, group);
  }

  template <int PER>
  static void shared_add(float* const* sums, const float* const* weights, std::int64_t count,
                         const RowBlock& block, std::int64_t dim, std::int64_t group, float* scratch) {
    const std::int64_t numbers = row_scales(Codes::kStorage, dim, group), bytes = Codes::bytes(dim);
    float* const own = scratch + kScaleRows * numbers;
    for (std::int64_t first = 0; first < block.count; first += kScaleRows) {
      const RowBlock rows = part(block, first, kScaleRows, dim, group);
      prefetch(rows.ahead, rows.count * bytes);
      const typename Codes::template Source<PER> source{
          reinterpret_cast<const typename Codes::Byte*>(rows.rows), scales_of(rows, numbers, scratch), dim,
          dim / group};
      for (std::int64_t i = 0; i < count; i += kTileHeads) {
        const std::int64_t heads = least(kTileHeads, count - i);
        float* to[kTileHeads];
        const float* weight[kTileHeads];
        for (std::int64_t h = 0; h < heads; ++h) {
          to[h] = Codes::sums_in_order(own + h * dim, sums[i + h], dim);
          weight[h] = weights[i + h] + first;
        }
        tile_add(to, weight, heads, source, rows.count, dim / kLanes);
        for (std::int64_t h = 0; h < heads; ++h) Codes::add_in_order(sums[i + h], to[h], dim);
      }
    }
  }

  static void add(float* const* sums, const float* const* weights, std::int64_t count, const RowBlock& block,
                  std::int64_t dim, std::int64_t group, float* scratch) {
    const std::int64_t per = vectors(group);
    if (count == 1) {
      if (per == 8) return direct_add<8>(sums[0], weights[0], block, dim, group, scratch);
      if (per == 4) return direct_add<4>(sums[0], weights[0], block, dim, group, scratch);
      if (per == 2) return direct_add<2>(sums[0], weights[0], block, dim, group, scratch);
      if (per == 1) return direct_add<1>(sums[0], weights[0], block, dim, group, scratch);
    } else {
      if (per == 8) return shared_add<8>(sums, weights, count, block, dim, group, scratch);
      if (per == 4) return shared_add<4>(sums, weights, count, block, dim, group, scratch);
      if (per == 2) return shared_add<2>(sums, weights, count, block, dim, group, scratch);
      if (per == 1) return shared_add<1>(sums, weights, count, block, dim, group, scratch);
    }
    for (std::int64_t first = 0; first < block.count; first += kSharedRows) {
      const RowBlock rows = part(block, first, kSharedRows, dim, group);
      Codes::load(scratch, rows, dim, group);
      const float* weight[kTileHeads];
      for (std::int64_t i = 0; i < count; i += kTileHeads) {
        const std::int64_t heads = least(kTileHeads, count - i);
        for (std::int64_t h = 0; h < heads; ++h) weight[h] = weights[i + h] + first;
        CHAI_ISA::add<float>(sums + i, weight, heads, scratch, rows.count, dim, nullptr);
      }
    }
  }

  static constexpr RowKernels kernels() { return {dots, add, Codes::load, Codes::store, scratch}; }
};

// --- What both widths store: docs/op.md, "How a row is stored" --------------------------------------------

CHAI_INLINE float half_rounded(float x, std::uint16_t* bits) {
  Float16 half;
  store_one(&half, x);
  *bits = half.bits;
  return load_one(&half);
}

// rint(x / scale) between two limits; 0 where the scale is 0.
CHAI_INLINE float code_of(float x, float scale, float lowest, float highest) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
  if (scale == 0.0f) return 0.0f;
  const float ratio = x / scale;
  const float limited = ratio < lowest ? lowest : (ratio > highest ? highest : ratio);
  return (limited + kRound) - kRound;
}

}  // namespace CHAI_ISA
}  // namespace chai
