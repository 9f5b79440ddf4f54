// Choosing the next token from logits, in the order that transformers applies its processors.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace chai {

struct SamplingSettings {
  double temperature = 0.0;  // 0 is greedy
  std::int64_t top_k = 0;    // 0 keeps every token
  double top_p = 1.0;        // 1 keeps every token
  double repetition_penalty = 1.0;
};

// Throws std::runtime_error if a value is out of range.
void check(const SamplingSettings& settings);

// The sampler of one row: its text depends on its prompt and the seed, never on what else is in the batch.
class Sampler {
 public:
  Sampler(const SamplingSettings& settings, std::uint64_t seed) : settings_(settings), random_(seed) {}

  // `logits` has `size` values; `context` is the prompt and the text so far. Throws if they are not finite.
  std::int64_t choose(const float* logits, std::size_t size, const std::vector<std::int64_t>& context);

 private:
  std::int64_t sample(const std::vector<float>& logits);

  SamplingSettings settings_;
  std::mt19937_64 random_;
};

}  // namespace chai
