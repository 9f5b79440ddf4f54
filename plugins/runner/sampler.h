// Choosing the next token from logits, in the order that transformers applies its processors.
// chai_export/runtime/sampling.py does the same; tests/data/sampling_cases.json holds both to it.
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

// Throws std::runtime_error if a value is not finite or out of range.
void check(const SamplingSettings& settings);

struct Candidate {
  std::int64_t token;
  double probability;
};

// What is drawn from: the tokens that survive temperature, top-k and top-p, ascending, with probabilities
// that sum to 1. `context` is the prompt and the text so far. Throws std::runtime_error if the logits are not
// finite.
std::vector<Candidate> candidates(const SamplingSettings& settings, const float* logits, std::size_t size,
                                  const std::vector<std::int64_t>& context);

// The candidate at `place`, in [0, 1), of the sum of the probabilities.
std::int64_t pick(const std::vector<Candidate>& candidates, double place);

// The sampler of one row: its text depends on its prompt and the seed, never on what else is in the batch.
class Sampler {
 public:
  Sampler(const SamplingSettings& settings, std::uint64_t seed) : settings_(settings), random_(seed) {}

  // Arguments and errors as of candidates().
  std::int64_t choose(const float* logits, std::size_t size, const std::vector<std::int64_t>& context);

 private:
  SamplingSettings settings_;
  std::mt19937_64 random_;
};

}  // namespace chai
