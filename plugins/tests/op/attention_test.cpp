// Random calls against attention written down plainly in double, for every storage type and instruction set,
// with tasks run in reverse, in parallel, in place and not, on caches in pages and in every storage. What the
// op must not read is not a number.
#include "chai/attention.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "chai/head_map.h"
#include "op/cpu/kernels.h"

#if defined(CHAI_TEST_WIDE)
namespace chai::wide {
extern const Kernels kKernels;
}
#endif

namespace {

using chai::Storage;
using Bytes = std::vector<unsigned char>;

std::int64_t size_of(Storage storage) {
  return storage == Storage::kFloat32 ? 4 : 2;
}

double tolerance(Storage storage) {
  return storage == Storage::kFloat32 ? 2e-5 : storage == Storage::kFloat16 ? 2e-3 : 1.6e-2;
}

// Test data takes few bits, so that every storage type holds it exactly: multiples of 1/16 up to 4.
void put(Bytes* tensor, Storage storage, std::size_t i, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (storage == Storage::kFloat32) {
    std::memcpy(tensor->data() + 4 * i, &bits, 4);
    return;
  }
  std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);  // bfloat16
  if (storage == Storage::kFloat16) {
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::int32_t exponent = static_cast<std::int32_t>((bits >> 23) & 0xff) - 112;
    half = static_cast<std::uint16_t>(sign | (x == 0.0f ? 0 : (exponent << 10) | ((bits >> 13) & 0x3ffu)));
    if (x != x) half = 0x7e00;
  }
  std::memcpy(tensor->data() + 2 * i, &half, 2);
}

double get(const Bytes& tensor, Storage storage, std::size_t i) {
  if (storage == Storage::kFloat32) {
    float x;
    std::memcpy(&x, tensor.data() + 4 * i, 4);
    return x;
  }
  std::uint16_t half;
  std::memcpy(&half, tensor.data() + 2 * i, 2);
  if (storage == Storage::kBfloat16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (half >> 10) & 0x1f;
  const int mantissa = half & 0x3ff;
  if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

// The pool of keys or of values, as the test sees it.
struct TestPool {
  Storage storage;
  std::int64_t heads, dim, group;
  Bytes past, present, past_scales, present_scales;

  std::int64_t row_bytes() const { return chai::row_bytes(storage, dim); }
  std::int64_t row_scales() const { return chai::row_scales(storage, dim, group); }
  double value(std::int64_t row, std::int64_t d) const {
    if (!chai::quantised(storage)) return get(present, storage, row * dim + d);
    const std::int64_t scales = row * row_scales();
    const double scale = get(present_scales, Storage::kFloat16, scales + d / group);
    if (storage == Storage::kInt8) return static_cast<signed char>(present[row * dim + d]) * scale;
    const unsigned char both = present[(row * dim + d) / 2];
    const double minimum = get(present_scales, Storage::kFloat16, scales + dim / group + d / group);
    return (d % 2 ? both >> 4 : both & 15) * scale + minimum;
  }
};

struct Problem {
  chai::AttentionCall call;
  Bytes query, key, value, output;
  TestPool keys, values;
  std::vector<std::int32_t> page_table, past_head_map, past_lengths, lengths, present_head_map;
  bool in_place = false;

  // Where a position of a row lies in a pool, counted in rows.
  std::int64_t place(const TestPool& pool, std::int64_t b, std::int64_t head, std::int64_t position) const {
    const chai::AttentionShape& s = call.shape;
    const std::int64_t page = page_table[b * s.entries + position / s.page_size];
    return (page * pool.heads + head) * s.page_size + position % s.page_size;
  }
};

class Generator {
 public:
  explicit Generator(unsigned seed) : engine_(seed) {}
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  float value() { return static_cast<float>(between(-64, 64)) / 16.0f; }
  Bytes tensor(Storage storage, std::size_t count) {
    Bytes bytes(count * size_of(storage));
    for (std::size_t i = 0; i < count; ++i) put(&bytes, storage, i, value());
    return bytes;
  }

 private:
  std::mt19937 engine_;
};

void poison(Bytes* tensor, Storage storage, std::int64_t matrix, std::int64_t rows, std::int64_t dim,
            std::int64_t first_row) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (std::int64_t i = (matrix * rows + first_row) * dim; i < (matrix + 1) * rows * dim; ++i) {
    put(tensor, storage, i, nan);
  }
}

// Not a number everywhere but in the positions that rows have; codes are any bytes.
void fill(Problem* p, TestPool* pool, Generator* random) {
  const chai::AttentionShape& s = p->call.shape;
  const std::int64_t rows = s.pages * pool->heads * s.page_size;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const bool quantised = chai::quantised(pool->storage);
  pool->past.resize(rows * pool->row_bytes());
  pool->past_scales.resize(rows * pool->row_scales() * 2);
  for (unsigned char& byte : pool->past) byte = static_cast<unsigned char>(random->between(0, 255));
  for (std::int64_t i = 0; i < rows * pool->row_scales(); ++i)
    put(&pool->past_scales, Storage::kFloat16, i, nan);
  for (std::int64_t i = 0; !quantised && i < rows * pool->dim; ++i) put(&pool->past, pool->storage, i, nan);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t head = 0; head < pool->heads; ++head) {
      for (std::int64_t t = 0; t < p->past_lengths[b]; ++t) {
        const std::int64_t row = p->place(*pool, b, head, t);
        for (std::int64_t i = 0; i < pool->row_scales(); ++i) {
          put(&pool->past_scales, Storage::kFloat16, row * pool->row_scales() + i, random->value() / 128.0f);
        }
        for (std::int64_t d = 0; !quantised && d < pool->dim; ++d) {
          put(&pool->past, pool->storage, row * pool->dim + d, random->value());
        }
      }
    }
  }
}

Storage cache_storage(Generator* random, Storage storage) {
  const Storage any[] = {storage, storage, Storage::kFloat16, Storage::kInt8, Storage::kInt4};
  return any[random->between(0, 4)];
}

// Rows are fresh, continued, decoding or inactive; large ones exercise blocks and parts.
Problem make_problem(Generator* random, Storage storage, bool large) {
  Problem p;
  chai::AttentionShape& s = p.call.shape;
  const std::int64_t group = random->between(1, large ? 2 : 3);
  s.batch = random->between(1, 3);
  s.kv_heads = random->between(1, large ? 3 : 6);
  s.heads = s.kv_heads * group;
  s.kept = random->between(1, s.kv_heads);
  s.tokens = random->between(1, large ? 450 : 12);
  s.page_size = random->between(0, 2) ? random->between(1, 70) : 2000;
  s.entries = (s.tokens + random->between(0, large ? 900 : 30)) / s.page_size + 1;
  s.pages = s.batch * s.entries + 2;
  p.call.storage = storage;
  p.call.keys.storage = cache_storage(random, storage);
  p.call.values.storage = cache_storage(random, storage);
  p.call.group = std::int64_t{2} << random->between(0, 4);
  const bool grouped = chai::quantised(p.call.keys.storage) || chai::quantised(p.call.values.storage);
  s.key_dim = grouped ? p.call.group * random->between(1, 4) : random->between(1, 40);
  s.value_dim = grouped ? p.call.group * random->between(1, 4) : random->between(1, 70);
  p.call.probe_tokens = random->between(1, 8);
  p.call.online = random->between(0, 3) != 0;
  p.call.scale = random->between(0, 1) ? 0.11f : 0.0f;
  p.call.window = random->between(0, 2) ? 0 : random->between(1, 40);
  p.in_place = random->between(0, 1) != 0;
  const std::int64_t capacity = std::min(s.capacity(), s.tokens + 930);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const std::int64_t kind = random->between(0, 4);
    const std::int64_t m = kind == 0 ? 0 : kind == 1 ? 1 : random->between(1, s.tokens);
    p.lengths.push_back(static_cast<std::int32_t>(m));
    p.past_lengths.push_back(static_cast<std::int32_t>(kind < 3 ? random->between(0, capacity - m) : 0));
    std::vector<std::int32_t> points(s.heads), map(s.heads);
    for (std::int32_t& point : points) point = static_cast<std::int32_t>(random->between(0, 99));
    chai::cluster_heads(points.data(), 1, s.heads, s.kv_heads, random->between(1, s.kept), map.data());
    p.past_head_map.insert(p.past_head_map.end(), map.begin(), map.end());
  }
  p.page_table.resize(s.pages);
  for (std::int64_t i = 0; i < s.pages; ++i) p.page_table[i] = static_cast<std::int32_t>(i);
  for (std::int64_t i = s.pages; i > 1; --i)
    std::swap(p.page_table[i - 1], p.page_table[random->between(0, i - 1)]);
  p.page_table.resize(s.batch * s.entries);
  p.query = random->tensor(storage, s.batch * s.heads * s.tokens * s.key_dim);
  p.key = random->tensor(storage, s.batch * s.kv_heads * s.tokens * s.key_dim);
  p.value = random->tensor(storage, s.batch * s.kv_heads * s.tokens * s.value_dim);
  p.keys = {p.call.keys.storage, s.kept, s.key_dim, p.call.group, {}, {}, {}, {}};
  p.values = {p.call.values.storage, s.kv_heads, s.value_dim, p.call.group, {}, {}, {}, {}};
  fill(&p, &p.keys, random);
  fill(&p, &p.values, random);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      poison(&p.query, storage, b * s.heads + h, s.tokens, s.key_dim, p.lengths[b]);
    }
    for (std::int64_t g = 0; g < s.kv_heads; ++g) {
      poison(&p.key, storage, b * s.kv_heads + g, s.tokens, s.key_dim, p.lengths[b]);
      poison(&p.value, storage, b * s.kv_heads + g, s.tokens, s.value_dim, p.lengths[b]);
    }
  }
  return p;
}

void run_reversed(void*, std::size_t count, void (*task)(void*, std::size_t), void* data) {
  for (std::size_t i = count; i > 0; --i) task(data, i - 1);
}

void run_threads(void*, std::size_t count, void (*task)(void*, std::size_t), void* data) {
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < count; i = next++) task(data, i);
  };
  std::thread other(work);
  work();
  other.join();
}

void bind(TestPool* pool, bool in_place, chai::Pool* to) {
  pool->present = in_place ? pool->past : Bytes(pool->past.size(), 0xee);
  pool->present_scales = in_place ? pool->past_scales : Bytes(pool->past_scales.size(), 0xee);
  to->past = in_place ? pool->present.data() : pool->past.data();
  to->present = pool->present.data();
  to->past_scales = in_place ? pool->present_scales.data() : pool->past_scales.data();
  to->present_scales = pool->present_scales.data();
}

void evaluate(Problem* p, chai::Isa isa, std::size_t threads) {
  chai::AttentionCall& call = p->call;
  const chai::AttentionShape& s = call.shape;
  p->output.assign(s.batch * s.tokens * s.heads * s.value_dim * size_of(call.storage), 0xff);
  bind(&p->keys, p->in_place, &call.keys);
  bind(&p->values, p->in_place, &call.values);
  p->present_head_map.assign(p->past_head_map.size(), -1);
  call.query = p->query.data();
  call.key = p->key.data();
  call.value = p->value.data();
  call.page_table = p->page_table.data();
  call.past_head_map = p->past_head_map.data();
  call.past_lengths = p->past_lengths.data();
  call.lengths = p->lengths.data();
  call.output = p->output.data();
  call.present_head_map = p->present_head_map.data();
  const chai::Executor executor{nullptr, threads % 2 ? run_reversed : run_threads, threads};
  REQUIRE(chai::check(call) == "");
#if defined(CHAI_TEST_WIDE)
  (void)isa;
  chai::attend(call, chai::wide::kKernels, executor);
#else
  chai::attend(call, isa, executor);
#endif
}

// What one query head's token attends to, in double.
std::vector<double> attended(const Problem& p, std::int64_t b, std::int64_t h, std::int64_t token,
                             bool exact) {
  const chai::AttentionShape& s = p.call.shape;
  const Storage storage = p.call.storage;
  const std::int64_t group = s.heads / s.kv_heads;
  const std::int32_t* map = p.present_head_map.data() + b * s.heads;
  const std::int64_t r = exact ? h : map[h];
  const std::int64_t slot = chai::assign_slots(map, s.heads, s.kv_heads).of_kv_head[r / group];
  const double scale = p.call.scale != 0.0f ? p.call.scale : 1.0 / std::sqrt(static_cast<double>(s.key_dim));
  const std::int64_t seen = p.past_lengths[b] + token + 1;
  const std::int64_t first = p.call.first_visible(seen - 1);
  std::vector<double> weights(seen, 0.0);
  double largest = -std::numeric_limits<double>::infinity();
  for (std::int64_t t = first; t < seen; ++t) {
    double dot = 0.0;
    for (std::int64_t d = 0; d < s.key_dim; ++d) {
      const double k =
          exact ? get(p.key, storage, ((b * s.kv_heads + r / group) * s.tokens + t) * s.key_dim + d)
                : p.keys.value(p.place(p.keys, b, slot, t), d);
      dot += k * get(p.query, storage, ((b * s.heads + r) * s.tokens + token) * s.key_dim + d);
    }
    weights[t] = dot * scale;
    largest = std::max(largest, weights[t]);
  }
  double sum = 0.0;
  for (std::int64_t t = first; t < seen; ++t) sum += weights[t] = std::exp(weights[t] - largest);
  std::vector<double> out(s.value_dim, 0.0);
  for (std::int64_t t = first; t < seen; ++t) {
    for (std::int64_t v = 0; v < s.value_dim; ++v) {
      const std::int64_t at = ((b * s.kv_heads + h / group) * s.tokens + t) * s.value_dim + v;
      const double x =
          exact ? get(p.value, storage, at) : p.values.value(p.place(p.values, b, h / group, t), v);
      out[v] += weights[t] / sum * x;
    }
  }
  return out;
}

void check_output(const Problem& p) {
  const chai::AttentionShape& s = p.call.shape;
  const double allowed = 4.0 * tolerance(p.call.storage);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const bool fresh = p.call.online && p.past_lengths[b] == 0;
    for (std::int64_t token = 0; token < s.tokens; ++token) {
      for (std::int64_t h = 0; h < s.heads; ++h) {
        std::vector<double> wanted(s.value_dim, 0.0);
        if (token < p.lengths[b]) wanted = attended(p, b, h, token, fresh && token < p.call.probe_tokens);
        for (std::int64_t v = 0; v < s.value_dim; ++v) {
          const std::int64_t at = ((b * s.tokens + token) * s.heads + h) * s.value_dim + v;
          const double actual = get(p.output, p.call.storage, at);
          if (std::fabs(actual - wanted[v]) <= allowed) continue;  // millions of them: no assertion each
          CAPTURE(b);
          CAPTURE(token);
          CAPTURE(h);
          REQUIRE(actual == wanted[v]);
        }
      }
    }
  }
}

// New rows are what was given, as nearly as the storage can hold it, and nothing else was written.
void check_cache(const Problem& p, const TestPool& pool, const Bytes& fresh) {
  const chai::AttentionShape& s = p.call.shape;
  Bytes rows = pool.past, scales = pool.past_scales;
  double worst = 0.0;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const chai::Slots kept = chai::assign_slots(p.present_head_map.data() + b * s.heads, s.heads, s.kv_heads);
    for (std::int64_t g = 0; g < s.kv_heads && p.lengths[b] > 0; ++g) {
      const std::int64_t slot = &pool == &p.values ? g : kept.of_kv_head[g];
      if (slot < 0) continue;
      for (std::int64_t t = 0; t < p.lengths[b]; ++t) {
        const std::int64_t row = p.place(pool, b, slot, p.past_lengths[b] + t);
        const std::int64_t from = ((b * s.kv_heads + g) * s.tokens + t) * pool.dim;
        for (std::int64_t d = 0; d < pool.dim; ++d) {
          worst = std::max(worst, std::fabs(pool.value(row, d) - get(fresh, p.call.storage, from + d)));
        }
        std::memcpy(rows.data() + row * pool.row_bytes(), pool.present.data() + row * pool.row_bytes(),
                    pool.row_bytes());
        // Of caches without scales this is nothing, from nowhere.
        std::copy_n(pool.present_scales.begin() + row * pool.row_scales() * 2, pool.row_scales() * 2,
                    scales.begin() + row * pool.row_scales() * 2);
      }
    }
  }
  INFO("the cache holds the past and the new rows, and nothing else was written");
  REQUIRE(bool(rows == pool.present));
  REQUIRE(bool(scales == pool.present_scales));
  // Values lie between -4 and 4: half a step of 8 and of 4 bits, and the rounding of their scales.
  const double allowed = pool.storage == Storage::kInt8 ? 0.02 : pool.storage == Storage::kInt4 ? 0.3 : 0.0;
  REQUIRE(worst <= allowed);
}

TEST_CASE("shapes that do not go together are refused") {
  Generator random(99);
  Problem p = make_problem(&random, Storage::kFloat32, false);
  p.call.page_table = p.page_table.data();
  p.call.past_head_map = p.past_head_map.data();
  p.call.past_lengths = p.past_lengths.data();
  p.call.lengths = p.lengths.data();
  p.call.shape.kv_heads = 2;
  p.call.shape.heads = 4;
  chai::AttentionCall bad = p.call;
  bad.shape.key_dim = 0;
  CHECK(chai::check(bad) != "");
  bad = p.call;
  bad.shape.heads = 3;
  CHECK(chai::check(bad) != "");
  bad = p.call;
  bad.shape.kept = 3;
  CHECK(chai::check(bad) != "");
  bad = p.call;
  bad.window = -1;
  CHECK(chai::check(bad) != "");
  bad = p.call;
  bad.keys.storage = Storage::kInt4;
  bad.group = 3;
  bad.shape.key_dim = 9;
  CHECK(chai::check(bad) != "");
}

TEST_CASE("attention is what its definition says, for every storage type and instruction set") {
  Generator random(7);
  for (int round = 0; round < 40; ++round) {
    for (Storage storage : {Storage::kFloat32, Storage::kFloat16, Storage::kBfloat16}) {
      for (chai::Isa isa : {chai::Isa::kPortable, chai::Isa::kAvx2, chai::Isa::kAvx512}) {
        if (!chai::available(isa)) continue;
        CAPTURE(round);
        CAPTURE(chai::name(isa));
        Problem p = make_problem(&random, storage, round % 10 == 9);
        evaluate(&p, isa, round % 5 + 1);
        check_cache(p, p.keys, p.key);
        check_cache(p, p.values, p.value);
        check_output(p);
      }
    }
  }
}

}  // namespace
