// In which order to read a cache: variants of the decode kernel's two inner loops on 128 MiB, one thread.
//
//   g++ -std=c++17 -O3 -march=native -DCHAI_ISA=native -ffp-contract=fast -I plugins -I plugins/include \
//       -Wno-aggressive-loop-optimizations benchmarks/native/read_order.cpp -o /tmp/read_order
//   /tmp/read_order
//
// GB/s by the thread's own CPU time, the best of 15 rounds in which the variants take turns.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "op/cpu/kernels.h"
#include "op/cpu/stream_kernel.h"

namespace {

using namespace chai::native;

constexpr std::int64_t kDim = 128;
constexpr std::int64_t kRows = std::int64_t{1} << 18;

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Data {
  const float* cache;
  std::vector<float> weights = std::vector<float>(kRows, 1e-6f), scores = std::vector<float>(kRows);
  std::vector<float> query = std::vector<float>(kDim, 0.01f), out = std::vector<float>(4 * kDim);
};

void plain(Data* d) {
  Vec total[8] = {};
  for (std::int64_t i = 0; i < kRows * kDim; i += 8 * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) total[j] += load(d->cache + i + j * kLanes);
  }
  for (const Vec& t : total) d->out[0] += 1e-20f * sum(t);
}

void values_in_registers(Data* d) {
  weighted_sum(d->out.data(), d->cache, d->weights.data(), kRows, kDim);
}

// Several rows per step: the accumulator is loaded and stored once for all of them.
template <int ROWS>
void values_in_memory(Data* d) {
  for (std::int64_t t = 0; t < kRows; t += ROWS) {
    add_rows<ROWS>(d->out.data(), d->cache + t * kDim, d->weights.data() + t, kDim);
  }
}

// Eight rows per step, the next but one eight asked for meanwhile.
void values_prefetched(Data* d) {
  for (std::int64_t t = 0; t < kRows; t += 8) {
    const float* block = d->cache + t * kDim;
    for (std::int64_t i = 0; i < 8 * kDim; i += 16) __builtin_prefetch(block + 16 * kDim + i);
    add_rows<8>(d->out.data(), block, d->weights.data() + t, kDim);
  }
}

// Four heads on the same values: a block of rows from memory by the first, from L1 by the others.
template <int BLOCK>
void values_of_four_heads(Data* d) {
  for (std::int64_t t = 0; t < kRows; t += BLOCK) {
    weighted_sum(d->out.data(), d->cache + t * kDim, d->weights.data() + t, BLOCK, kDim);
    for (int h = 1; h < 4; ++h) {
      weighted_sum_from_l1(d->out.data() + h * kDim, d->cache + t * kDim, d->weights.data() + t, BLOCK, kDim);
    }
  }
}

void keys_by_row(Data* d) {
  dots_of_one(d->query.data(), d->cache, kRows, kDim, d->scores.data());
}

// Four rows side by side, which needs a query vector only once for all of them.
void keys_side_by_side(Data* d) {
  for (std::int64_t t = 0; t < kRows; t += 4) {
    Vec total[4] = {};
    for (std::int64_t i = 0; i < kDim; i += kLanes) {
      const Vec q = load(d->query.data() + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) total[r] += q * load(d->cache + (t + r) * kDim + i);
    }
    const Quad result = sums(total[0], total[1], total[2], total[3]);
    __builtin_memcpy(d->scores.data() + t, &result, sizeof(result));
  }
}

}  // namespace

int main() {
  const std::size_t bytes = kRows * kDim * sizeof(float);
  auto* cache = static_cast<float*>(std::aligned_alloc(std::size_t{1} << 21, bytes));
  madvise(cache, bytes, MADV_HUGEPAGE);
  for (std::int64_t i = 0; i < kRows * kDim; ++i) cache[i] = 0.01f * static_cast<float>(i % 97);
  Data data{cache};
  struct Variant {
    const char* name;
    void (*run)(Data*);
    double best = 1e9;
  } variants[] = {
      {"read only", plain},
      {"values: row by row, accumulators in registers", values_in_registers},
      {"values: row by row, accumulators in memory", values_in_memory<1>},
      {"values: 2 rows at a time", values_in_memory<2>},
      {"values: 4 rows at a time", values_in_memory<4>},
      {"values: 8 rows at a time", values_in_memory<8>},
      {"values: 8 rows at a time, software prefetch", values_prefetched},
      {"values of 4 heads, blocks of 8 rows", values_of_four_heads<8>},
      {"values of 4 heads, blocks of 16 rows", values_of_four_heads<16>},
      {"values of 4 heads, blocks of 64 rows", values_of_four_heads<64>},
      {"keys: row by row", keys_by_row},
      {"keys: 4 rows side by side", keys_side_by_side},
  };
  for (int round = 0; round < 15; ++round) {
    for (Variant& variant : variants) {
      const double begin = now();
      variant.run(&data);
      variant.best = std::min(variant.best, now() - begin);
    }
  }
  for (const Variant& variant : variants) {
    std::printf("%-48s %5.1f GB/s\n", variant.name, static_cast<double>(bytes) / variant.best / 1e9);
  }
  return 0;
}
