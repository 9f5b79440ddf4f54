// Rows in 4 bits: code times the scale of its group, plus its minimum. A byte holds the elements 2i (low) and
// 2i+1, so that products keep even and odd elements apart.
#pragma once

#include "op/cpu/quantised_rows.h"

namespace chai {
namespace CHAI_ISA {

struct Int4Codes {
  using Byte = std::uint8_t;
  static constexpr Storage kStorage = Storage::kInt4;
  static constexpr std::int64_t kMostVectors = 4;
  static std::int64_t bytes(std::int64_t elements) { return elements / 2; }

  // The two codes of each byte as floats. One permutation looks a code up by the low bits of its lane.
#if defined(__AVX512F__)
  static CHAI_INLINE Vec low_codes(IntVec both) {
    return _mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(both), lane_numbers());
  }
#else
  static CHAI_INLINE Vec low_codes(IntVec both) { return to_floats(both & 15); }
#endif
  static CHAI_INLINE Vec high_codes(IntVec both) { return to_floats(both >> 4); }

  // A byte is 16 high + low, and whole bytes become floats without a shift:
  // query · row = Σ_g scale_g ((even - odd / 16) · low + odd / 16 · bytes) + minimum_g · (sum of the query's
  // group)
  struct Query {
    const float* for_low;
    const float* for_bytes;
    const float* sums;

    Query(const float* query, std::int64_t dim, std::int64_t group, float* scratch)
        : for_low(scratch), for_bytes(scratch + dim / 2), sums(scratch + dim) {
      float* const to = scratch;
      for (std::int64_t i = 0; i < dim / 2; ++i) {
        const float odd = query[2 * i + 1] * 0.0625f;
        to[i] = query[2 * i] - odd;
        to[dim / 2 + i] = odd;
      }
      for (std::int64_t g = 0; g < dim / group; ++g) {
        float total = 0.0f;
        for (std::int64_t i = 0; i < group; ++i) total += query[g * group + i];
        to[dim + g] = total;
      }
    }

    // Lanes whose sum is the minima's part.
    CHAI_INLINE Vec offset(const float* scales, std::int64_t groups) const {
      Vec total = {};
      std::int64_t g = 0;
      for (; g + 4 <= groups; g += 4) total += widened(load_four(scales + groups + g) * load_four(sums + g));
      for (; g < groups; ++g) total[0] += scales[groups + g] * sums[g];
      return total;
    }
  };

  template <int PER, int GROUPS>
  static CHAI_INLINE Vec dot(const Query& query, const Byte* codes, const float* scales,
                             std::int64_t groups) {
    const std::int64_t count = GROUPS > 0 ? GROUPS : groups;
    Vec total = query.offset(scales, count);
#pragma GCC unroll 4
    for (std::int64_t g = 0; g < count; ++g) {
      Vec part = {};
#pragma GCC unroll 4
      for (int i = 0; i < PER; ++i) {
        const std::int64_t at = (g * PER + i) * kLanes;
        const IntVec both = load_bytes(codes + at);
        part += CHAI_ISA::load(query.for_low + at) * low_codes(both);
        part += CHAI_ISA::load(query.for_bytes + at) * to_floats(both);
      }
      total += part * splat(scales[g]);
    }
    return total;
  }

  // Sums of low codes (even elements), of whole bytes, and of the minima.
  struct Sum {
    float* low;     // [dim/2], then those of bytes [dim/2]
    float* minima;  // [groups]

    Sum(std::int64_t dim, std::int64_t group, float* scratch) : low(scratch), minima(scratch + dim) {
      __builtin_memset(scratch, 0, (dim + dim / group) * sizeof(float));
    }
    float* target(float*) const { return low; }
    void add_offsets(const float* factors, std::int64_t rows, std::int64_t groups) {
      std::int64_t g = 0;
      for (; g + 4 <= groups; g += 4) {
        Quad total[2] = {};
        const float* from = factors + groups + g;
        std::int64_t t = 0;
        for (; t + 2 <= rows; t += 2, from += 4 * groups) {
          total[0] += load_four(from);
          total[1] += load_four(from + 2 * groups);
        }
        if (t < rows) total[0] += load_four(from);
        store_four(minima + g, load_four(minima + g) + (total[0] + total[1]));
      }
      for (; g < groups; ++g) {
        float two[2] = {};
        std::int64_t t = 0;
        for (; t + 2 <= rows; t += 2) {
          two[0] += factors[t * 2 * groups + groups + g];
          two[1] += factors[(t + 1) * 2 * groups + groups + g];
        }
        if (t < rows) two[0] += factors[t * 2 * groups + groups + g];
        minima[g] += two[0] + two[1];
      }
    }
    void finish(float* sums, std::int64_t dim, std::int64_t group) {
      for (std::int64_t g = 0; g < dim / group; ++g) {
        for (std::int64_t i = g * group / 2; i < (g + 1) * group / 2; ++i) {
          sums[2 * i] += low[i] + minima[g];
          sums[2 * i + 1] += (low[dim / 2 + i] - low[i]) * 0.0625f + minima[g];
        }
      }
    }
  };

  template <int PER, int GROUPS>
  static CHAI_INLINE void add_columns(float* low_sums, float* byte_sums, const Byte* codes,
                                      const float* factors, std::int64_t rows, std::int64_t row_length,
                                      std::int64_t groups, const char* ahead) {
    Vec low[GROUPS * PER], whole[GROUPS * PER];
#pragma GCC unroll 4
    for (int i = 0; i < GROUPS * PER; ++i) {
      low[i] = CHAI_ISA::load(low_sums + i * kLanes);
      whole[i] = CHAI_ISA::load(byte_sums + i * kLanes);
    }
    for (std::int64_t t = 0; t < rows; ++t) {
      const Byte* row = codes + t * row_length;
      if (ahead != nullptr) prefetch(ahead + t * row_length, row_length);
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; ++g) {
        const Vec factor = splat(factors[t * 2 * groups + g]);
#pragma GCC unroll 4
        for (int i = g * PER; i < (g + 1) * PER; ++i) {
          const IntVec both = load_bytes(row + i * kLanes);
          low[i] += factor * low_codes(both);
          whole[i] += factor * to_floats(both);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < GROUPS * PER; ++i) {
      CHAI_ISA::store(low_sums + i * kLanes, low[i]);
      CHAI_ISA::store(byte_sums + i * kLanes, whole[i]);
    }
  }

  template <int PER>
  static void add_rows(float* low, const Byte* codes, const float* factors, std::int64_t rows,
                       std::int64_t dim, std::int64_t groups, const char* ahead) {
    constexpr int kGroups = kColumnVectors / 2 / PER;
    float* bytes = low + dim / 2;
    std::int64_t g = 0;
    for (; g + kGroups <= groups; g += kGroups) {
      const std::int64_t at = g * PER * kLanes;
      add_columns<PER, kGroups>(low + at, bytes + at, codes + at, factors + g, rows, dim / 2, groups,
                                g == 0 ? ahead : nullptr);
    }
    for (; g < groups; ++g) {
      const std::int64_t at = g * PER * kLanes;
      add_columns<PER, 1>(low + at, bytes + at, codes + at, factors + g, rows, dim / 2, groups,
                          g == 0 ? ahead : nullptr);
    }
  }

  // Rows as floats: the even elements of a vector of bytes, the odd ones, those of the next, ….
  template <int PER>
  struct Source {
    const Byte* codes;
    const float* scales;
    std::int64_t dim, groups;

    struct Row {
      const Byte* codes;
      const float* scales;
      const float* minima;
      CHAI_INLINE Vec vector(std::int64_t j) const {
        const std::int64_t at = j / 2, group = at / PER;
        const IntVec both = load_bytes(codes + at * kLanes);
        return (j % 2 == 0 ? low_codes(both) : high_codes(both)) * splat(scales[group]) +
               splat(minima[group]);
      }
    };
    CHAI_INLINE Row at(std::int64_t t) const {
      const float* own = scales + t * 2 * groups;
      return {codes + t * (dim / 2), own, own + groups};
    }
  };
  // A query in the order of a source's elements.
  static const float* in_order(float* to, const float* query, std::int64_t dim) {
    for (std::int64_t first = 0; first < dim; first += 2 * kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        to[first + i] = query[first + 2 * i];
        to[first + kLanes + i] = query[first + 2 * i + 1];
      }
    }
    return to;
  }
  // Where sums in that order begin, at zero, and what adds them to those in the order of the row.
  static float* sums_in_order(float* to, float*, std::int64_t dim) {
    __builtin_memset(to, 0, dim * sizeof(float));
    return to;
  }
  static void add_in_order(float* sums, const float* from, std::int64_t dim) {
    for (std::int64_t first = 0; first < dim; first += 2 * kLanes) {
      const Vec even = CHAI_ISA::load(from + first), odd = CHAI_ISA::load(from + first + kLanes);
      float* to = sums + first;
      CHAI_ISA::store(to, CHAI_ISA::load(to) + __builtin_shuffle(even, odd, kFirstHalf));
      CHAI_ISA::store(to + kLanes, CHAI_ISA::load(to + kLanes) + __builtin_shuffle(even, odd, kSecondHalf));
    }
  }

  static void load(float* to, const RowBlock& block, std::int64_t dim, std::int64_t group) {
    const auto* codes = reinterpret_cast<const Byte*>(block.rows);
    const std::uint16_t* scales = block.scales;
    const std::int64_t groups = dim / group;
    for (std::int64_t t = 0; t < block.count; ++t, scales += 2 * groups) {
      for (std::int64_t g = 0; g < groups; ++g, to += group, codes += group / 2) {
        const float scale = half_to_float(scales[g]), minimum = half_to_float(scales[groups + g]);
        std::int64_t i = 0;
        for (; i + kLanes <= group / 2; i += kLanes) {
          const IntVec both = load_bytes(codes + i);
          const Vec low = to_floats(both & 15) * scale + minimum,
                    high = to_floats(both >> 4) * scale + minimum;
          CHAI_ISA::store(to + 2 * i, __builtin_shuffle(low, high, kFirstHalf));
          CHAI_ISA::store(to + 2 * i + kLanes, __builtin_shuffle(low, high, kSecondHalf));
        }
        for (; i < group / 2; ++i) {
          to[2 * i] = static_cast<float>(codes[i] & 15) * scale + minimum;
          to[2 * i + 1] = static_cast<float>(codes[i] >> 4) * scale + minimum;
        }
      }
    }
  }

  static void store(const RowBlock& block, const float* from, std::int64_t dim, std::int64_t group) {
    auto* codes = reinterpret_cast<Byte*>(block.rows);
    const std::int64_t groups = dim / group;
    for (std::int64_t t = 0; t < block.count; ++t) {
      std::uint16_t* scales = block.scales + t * 2 * groups;
      for (std::int64_t g = 0; g < groups; ++g, from += group, codes += group / 2) {
        float least_value = from[0], largest = from[0];
        for (std::int64_t i = 1; i < group; ++i) {
          least_value = from[i] < least_value ? from[i] : least_value;
          largest = from[i] > largest ? from[i] : largest;
        }
        const float low = half_rounded(least_value, scales + groups + g);
        const float scale = half_rounded((largest - low) / 15.0f, scales + g);
        for (std::int64_t i = 0; i < group / 2; ++i) {
          const auto even = static_cast<unsigned>(code_of(from[2 * i] - low, scale, 0.0f, 15.0f));
          const auto odd = static_cast<unsigned>(code_of(from[2 * i + 1] - low, scale, 0.0f, 15.0f));
          codes[i] = static_cast<Byte>(even | odd << 4);
        }
      }
    }
  }
};

}  // namespace CHAI_ISA
}  // namespace chai
