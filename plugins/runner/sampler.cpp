#include "runner/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <unordered_set>

#include "support/error.h"

namespace chai {
namespace {

struct Candidate {
  std::int64_t token;
  double weight;
};

// Every token whose score is at least the k-th: ties stay.
std::vector<Candidate> most_likely(const std::vector<float>& logits, double temperature, std::int64_t top_k) {
  float least = -INFINITY;
  if (top_k > 0 && static_cast<std::size_t>(top_k) < logits.size()) {
    std::vector<float> sorted = logits;
    std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(), std::greater<>());
    least = sorted[static_cast<std::size_t>(top_k - 1)];
  }
  const double highest = *std::max_element(logits.begin(), logits.end());
  std::vector<Candidate> candidates;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] < least) continue;
    const double weight = std::exp((static_cast<double>(logits[i]) - highest) / temperature);
    candidates.push_back({static_cast<std::int64_t>(i), weight});
  }
  return candidates;
}

double total(const std::vector<Candidate>& candidates) {
  double sum = 0.0;
  for (const Candidate& candidate : candidates) sum += candidate.weight;
  return sum;
}

// Drops the least likely tokens that together have at most 1 - top_p of the mass; one always stays.
void keep_mass(std::vector<Candidate>& candidates, double top_p) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.weight < b.weight; });
  const double droppable = (1.0 - top_p) * total(candidates);
  double mass = 0.0;
  std::size_t dropped = 0;
  while (dropped + 1 < candidates.size() && mass + candidates[dropped].weight <= droppable)
    mass += candidates[dropped++].weight;
  candidates.erase(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(dropped));
}

}  // namespace

void check(const SamplingSettings& settings) {
  require(settings.temperature >= 0.0 && std::isfinite(settings.temperature),
          "temperature is out of range; give 0 (greedy) or more");
  require(settings.top_k >= 0, "top_k is negative; give 0 (off) or more");
  require(settings.top_p > 0.0 && settings.top_p <= 1.0,
          "top_p is out of range; give a number above 0 and up to 1 (off)");
  require(settings.repetition_penalty > 0.0, "repetition_penalty is out of range; give a number above 0");
}

std::int64_t Sampler::choose(const float* logits, std::size_t size,
                             const std::vector<std::int64_t>& context) {
  std::vector<float> scores(logits, logits + size);
  require(std::none_of(scores.begin(), scores.end(), [](float score) { return std::isnan(score); }) &&
              std::isfinite(*std::max_element(scores.begin(), scores.end())),
          "the model's logits are not finite; export with --dtype float32 instead of float16");
  if (settings_.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(settings_.repetition_penalty);
    for (const std::int64_t token : std::unordered_set<std::int64_t>(context.begin(), context.end())) {
      float& score = scores[static_cast<std::size_t>(token)];
      score = score > 0.0f ? score / penalty : score * penalty;
    }
  }
  if (settings_.temperature > 0.0) return sample(scores);
  return std::max_element(scores.begin(), scores.end()) - scores.begin();
}

std::int64_t Sampler::sample(const std::vector<float>& logits) {
  std::vector<Candidate> candidates = most_likely(logits, settings_.temperature, settings_.top_k);
  if (settings_.top_p < 1.0) keep_mass(candidates, settings_.top_p);
  // The generator's own bits: std::uniform_real_distribution differs between standard libraries.
  double rest = static_cast<double>(random_() >> 11) * 0x1p-53 * total(candidates);
  for (const Candidate& candidate : candidates) {
    rest -= candidate.weight;
    if (rest < 0.0) return candidate.token;
  }
  return candidates.back().token;
}

}  // namespace chai
