// Rows in 8 bits: code times the scale of its group.
#pragma once

#include "op/cpu/quantised_rows.h"

namespace chai {
namespace CHAI_ISA {

struct Int8Codes {
  using Byte = std::int8_t;
  static constexpr Storage kStorage = Storage::kInt8;
  static constexpr std::int64_t kMostVectors = 8;
  static std::int64_t bytes(std::int64_t elements) { return elements; }

  struct Query {
    const float* values;
    Query(const float* query, std::int64_t, std::int64_t, float*) : values(query) {}
  };

  template <int PER, int GROUPS>
  static CHAI_INLINE Vec dot(const Query& query, const Byte* codes, const float* scales,
                             std::int64_t groups) {
    const std::int64_t count = GROUPS > 0 ? GROUPS : groups;
    Vec total = {};
#pragma GCC unroll 4
    for (std::int64_t g = 0; g < count; ++g) {
      const float* values = query.values + g * PER * kLanes;
      const Byte* from = codes + g * PER * kLanes;
      Vec part = CHAI_ISA::load(values) * CHAI_ISA::load(from);
#pragma GCC unroll 8
      for (int i = 1; i < PER; ++i) {
        part += CHAI_ISA::load(values + i * kLanes) * CHAI_ISA::load(from + i * kLanes);
      }
      total += part * splat(scales[g]);
    }
    return total;
  }

  struct Sum {
    Sum(std::int64_t, std::int64_t, float*) {}
    float* target(float* sums) const { return sums; }
    void add_offsets(const float*, std::int64_t, std::int64_t) {}
    void finish(float*, std::int64_t, std::int64_t) {}
  };

  template <int PER, int GROUPS>
  static CHAI_INLINE void add_columns(float* out, const Byte* codes, const float* factors, std::int64_t rows,
                                      std::int64_t dim, std::int64_t groups, const char* ahead) {
    Vec total[GROUPS * PER];
#pragma GCC unroll 8
    for (int i = 0; i < GROUPS * PER; ++i) total[i] = CHAI_ISA::load(out + i * kLanes);
    for (std::int64_t t = 0; t < rows; ++t) {
      const Byte* row = codes + t * dim;
      if (ahead != nullptr) prefetch(ahead + t * dim, dim);
#pragma GCC unroll 8
      for (int g = 0; g < GROUPS; ++g) {
        const Vec factor = splat(factors[t * groups + g]);
#pragma GCC unroll 8
        for (int i = g * PER; i < (g + 1) * PER; ++i) {
          total[i] += factor * CHAI_ISA::load(row + i * kLanes);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < GROUPS * PER; ++i) CHAI_ISA::store(out + i * kLanes, total[i]);
  }

  template <int PER>
  static void add_rows(float* out, const Byte* codes, const float* factors, std::int64_t rows,
                       std::int64_t dim, std::int64_t groups, const char* ahead) {
    constexpr int kGroups = kColumnVectors / PER;
    std::int64_t g = 0;
    for (; g + kGroups <= groups; g += kGroups) {
      const std::int64_t at = g * PER * kLanes;
      add_columns<PER, kGroups>(out + at, codes + at, factors + g, rows, dim, groups,
                                g == 0 ? ahead : nullptr);
    }
    for (; g < groups; ++g) {
      const std::int64_t at = g * PER * kLanes;
      add_columns<PER, 1>(out + at, codes + at, factors + g, rows, dim, groups, g == 0 ? ahead : nullptr);
    }
  }

  // Rows as floats, vector by vector.
  template <int PER>
  struct Source {
    const Byte* codes;
    const float* scales;
    std::int64_t dim, groups;

    struct Row {
      const Byte* codes;
      const float* scales;
      CHAI_INLINE Vec vector(std::int64_t j) const {
        return CHAI_ISA::load(codes + j * kLanes) * splat(scales[j / PER]);
      }
    };
    CHAI_INLINE Row at(std::int64_t t) const { return {codes + t * dim, scales + t * groups}; }
  };
  // The order of a source's elements is that of the row.
  static const float* in_order(float*, const float* query, std::int64_t) { return query; }
  static float* sums_in_order(float*, float* sums, std::int64_t) { return sums; }
  static void add_in_order(float*, const float*, std::int64_t) {}

  static void load_row(float* to, const Byte* codes, const std::uint16_t* scales, std::int64_t dim,
                       std::int64_t group) {
    for (std::int64_t first = 0; first < dim; first += group, ++scales) {
      const float scale = half_to_float(*scales);
      std::int64_t i = first;
      for (; i + kLanes <= first + group; i += kLanes)
        CHAI_ISA::store(to + i, CHAI_ISA::load(codes + i) * scale);
      for (; i < first + group; ++i) to[i] = static_cast<float>(codes[i]) * scale;
    }
  }

  static void load(float* to, const RowBlock& block, std::int64_t dim, std::int64_t group) {
    const auto* codes = reinterpret_cast<const Byte*>(block.rows);
    for (std::int64_t t = 0; t < block.count; ++t) {
      load_row(to + t * dim, codes + t * dim, block.scales + t * (dim / group), dim, group);
    }
  }

  static void store(const RowBlock& block, const float* from, std::int64_t dim, std::int64_t group) {
    auto* codes = reinterpret_cast<Byte*>(block.rows);
    const std::int64_t groups = block.count * (dim / group);
    for (std::int64_t g = 0; g < groups; ++g, from += group, codes += group) {
      float largest = 0.0f;
      for (std::int64_t i = 0; i < group; ++i) {
        const float size = __builtin_fabsf(from[i]);
        largest = size > largest ? size : largest;
      }
      const float scale = half_rounded(largest / 127.0f, block.scales + g);
      for (std::int64_t i = 0; i < group; ++i) {
        codes[i] = static_cast<Byte>(code_of(from[i], scale, -127.0f, 127.0f));
      }
    }
  }
};

}  // namespace CHAI_ISA
}  // namespace chai
