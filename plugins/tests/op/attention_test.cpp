// Random calls against attention written down plainly in double, for every storage type and instruction set,
// with tasks run in reverse, in parallel, in place and not. What the op must not read is not a number.
#include "chai/attention.h"

#include <doctest/doctest.h>

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
const Kernels& kernels(Storage storage);
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

struct Problem {
  chai::AttentionCall call;
  Bytes query, key, value, past_key, past_value, output, present_key, present_value;
  std::vector<std::int32_t> past_head_map, past_lengths, lengths, present_head_map;
  bool in_place = false;
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

// Rows are fresh, continued, decoding or inactive; large ones exercise blocks and parts.
Problem make_problem(Generator* random, Storage storage, bool large) {
  Problem p;
  chai::AttentionShape& s = p.call.shape;
  const std::int64_t group = random->between(1, large ? 2 : 3);
  s.batch = random->between(1, 3);
  s.kv_heads = random->between(1, large ? 3 : 6);
  s.heads = s.kv_heads * group;
  s.kept = random->between(1, s.kv_heads);
  s.key_dim = random->between(1, 40);
  s.value_dim = random->between(1, 70);
  s.tokens = random->between(1, large ? 450 : 12);
  s.capacity = s.tokens + random->between(0, large ? 900 : 30);
  p.call.storage = storage;
  p.call.probe_tokens = random->between(1, 8);
  p.call.online = random->between(0, 3) != 0;
  p.call.scale = random->between(0, 1) ? 0.11f : 0.0f;
  p.in_place = random->between(0, 1) != 0;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const std::int64_t kind = random->between(0, 4);
    const std::int64_t m = kind == 0 ? 0 : kind == 1 ? 1 : random->between(1, s.tokens);
    p.lengths.push_back(static_cast<std::int32_t>(m));
    p.past_lengths.push_back(static_cast<std::int32_t>(kind < 3 ? random->between(0, s.capacity - m) : 0));
    std::vector<std::int32_t> points(s.heads), map(s.heads);
    for (std::int32_t& point : points) point = static_cast<std::int32_t>(random->between(0, 99));
    chai::cluster_heads(points.data(), 1, s.heads, s.kv_heads, random->between(1, s.kept), map.data());
    p.past_head_map.insert(p.past_head_map.end(), map.begin(), map.end());
  }
  p.query = random->tensor(storage, s.batch * s.heads * s.tokens * s.key_dim);
  p.key = random->tensor(storage, s.batch * s.kv_heads * s.tokens * s.key_dim);
  p.value = random->tensor(storage, s.batch * s.kv_heads * s.tokens * s.value_dim);
  p.past_key = random->tensor(storage, s.batch * s.kept * s.capacity * s.key_dim);
  p.past_value = random->tensor(storage, s.batch * s.kv_heads * s.capacity * s.value_dim);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      poison(&p.query, storage, b * s.heads + h, s.tokens, s.key_dim, p.lengths[b]);
    }
    for (std::int64_t g = 0; g < s.kv_heads; ++g) {
      poison(&p.key, storage, b * s.kv_heads + g, s.tokens, s.key_dim, p.lengths[b]);
      poison(&p.value, storage, b * s.kv_heads + g, s.tokens, s.value_dim, p.lengths[b]);
      poison(&p.past_value, storage, b * s.kv_heads + g, s.capacity, s.value_dim, p.past_lengths[b]);
    }
    for (std::int64_t r = 0; r < s.kept; ++r) {
      poison(&p.past_key, storage, b * s.kept + r, s.capacity, s.key_dim, p.past_lengths[b]);
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

void evaluate(Problem* p, chai::Isa isa, std::size_t threads) {
  chai::AttentionCall& call = p->call;
  const chai::AttentionShape& s = call.shape;
  p->output.assign(s.batch * s.tokens * s.heads * s.value_dim * size_of(call.storage), 0xff);
  p->present_key = p->in_place ? p->past_key : Bytes(p->past_key.size(), 0xee);
  p->present_value = p->in_place ? p->past_value : Bytes(p->past_value.size(), 0xee);
  p->present_head_map.assign(p->past_head_map.size(), -1);
  call.query = p->query.data();
  call.key = p->key.data();
  call.value = p->value.data();
  call.past_key = p->in_place ? p->present_key.data() : p->past_key.data();
  call.past_value = p->in_place ? p->present_value.data() : p->past_value.data();
  call.past_head_map = p->past_head_map.data();
  call.past_lengths = p->past_lengths.data();
  call.lengths = p->lengths.data();
  call.output = p->output.data();
  call.present_key = p->present_key.data();
  call.present_value = p->present_value.data();
  call.present_head_map = p->present_head_map.data();
  const chai::Executor executor{nullptr, threads % 2 ? run_reversed : run_threads, threads};
  REQUIRE(chai::check(call) == "");
#if defined(CHAI_TEST_WIDE)
  (void)isa;
  chai::attend(call, chai::wide::kernels(call.storage), executor);
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
  std::vector<double> weights(seen);
  double largest = -std::numeric_limits<double>::infinity();
  for (std::int64_t t = 0; t < seen; ++t) {
    double dot = 0.0;
    for (std::int64_t d = 0; d < s.key_dim; ++d) {
      const double k =
          exact ? get(p.key, storage, ((b * s.kv_heads + r / group) * s.tokens + t) * s.key_dim + d)
                : get(p.present_key, storage, ((b * s.kept + slot) * s.capacity + t) * s.key_dim + d);
      dot += k * get(p.query, storage, ((b * s.heads + r) * s.tokens + token) * s.key_dim + d);
    }
    weights[t] = dot * scale;
    largest = std::max(largest, weights[t]);
  }
  double sum = 0.0;
  for (double& w : weights) sum += w = std::exp(w - largest);
  std::vector<double> out(s.value_dim, 0.0);
  for (std::int64_t t = 0; t < seen; ++t) {
    for (std::int64_t v = 0; v < s.value_dim; ++v) {
      const std::int64_t at = ((b * s.kv_heads + h / group) * s.capacity + t) * s.value_dim + v;
      out[v] += weights[t] / sum * get(p.present_value, storage, at);
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

// The cache is the past with the new rows of the kept heads in their places, byte by byte.
void check_cache(const Problem& p, const Bytes& past, const Bytes& present, const Bytes& fresh,
                 std::int64_t slots, std::int64_t dim) {
  const chai::AttentionShape& s = p.call.shape;
  const std::int64_t row_bytes = dim * size_of(p.call.storage);
  Bytes wanted = past;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const chai::Slots kept = chai::assign_slots(p.present_head_map.data() + b * s.heads, s.heads, s.kv_heads);
    for (std::int64_t g = 0; g < s.kv_heads && p.lengths[b] > 0; ++g) {
      const std::int64_t slot = slots == s.kv_heads && &past == &p.past_value ? g : kept.of_kv_head[g];
      if (slot < 0) continue;
      std::memcpy(wanted.data() + ((b * slots + slot) * s.capacity + p.past_lengths[b]) * row_bytes,
                  fresh.data() + (b * s.kv_heads + g) * s.tokens * row_bytes, p.lengths[b] * row_bytes);
    }
  }
  INFO("the cache holds the past and the new rows, and nothing else was written");
  REQUIRE(bool(wanted == present));
}

TEST_CASE("shapes that do not go together are refused") {
  Generator random(99);
  Problem p = make_problem(&random, Storage::kFloat32, false);
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
        check_cache(p, p.past_key, p.present_key, p.key, p.call.shape.kept, p.call.shape.key_dim);
        check_cache(p, p.past_value, p.present_value, p.value, p.call.shape.kv_heads, p.call.shape.value_dim);
        check_output(p);
      }
    }
  }
}

}  // namespace
