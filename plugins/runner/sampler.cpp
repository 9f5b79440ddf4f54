#include "runner/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <unordered_set>

#include "support/error.h"

namespace chai {
namespace {

// Scores of tokens seen before, divided by the penalty if positive and multiplied if negative. What overflows
// is the largest number there is; minus infinity, a token that never comes, stays.
void penalise(std::vector<double>& scores, const std::vector<std::int64_t>& context, double penalty) {
  constexpr double kLargest = std::numeric_limits<double>::max();
  for (const std::int64_t token : std::unordered_set<std::int64_t>(context.begin(), context.end())) {
    double& score = scores.at(static_cast<std::size_t>(token));
    if (std::isfinite(score))
      score = std::clamp(score > 0.0 ? score / penalty : score * penalty, -kLargest, kLargest);
  }
}

// Every token whose score is at least the k-th: ties stay.
std::vector<Candidate> most_likely(const std::vector<double>& scores, std::int64_t top_k) {
  double least = -INFINITY;
  if (top_k > 0 && static_cast<std::uint64_t>(top_k) < scores.size()) {
    std::vector<double> sorted = scores;
    std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(), std::greater<>());
    least = sorted[static_cast<std::size_t>(top_k - 1)];
  }
  std::vector<Candidate> kept;
  for (std::size_t i = 0; i < scores.size(); ++i)
    if (scores[i] >= least) kept.push_back({static_cast<std::int64_t>(i), scores[i]});
  return kept;
}

void normalise(std::vector<Candidate>& candidates) {
  double sum = 0.0;
  for (const Candidate& candidate : candidates) sum += candidate.probability;
  for (Candidate& candidate : candidates) candidate.probability /= sum;
}

// Scores become probabilities. The maximum is subtracted first, so a tiny temperature leaves just the
// likeliest.
void softmax(std::vector<Candidate>& candidates, double temperature) {
  double highest = -INFINITY;
  for (const Candidate& candidate : candidates) highest = std::max(highest, candidate.probability);
  for (Candidate& candidate : candidates)
    candidate.probability = std::exp((candidate.probability - highest) / temperature);
  normalise(candidates);
}

// Drops the least likely tokens that together have at most 1 - top_p of the mass; one always stays.
void keep_mass(std::vector<Candidate>& candidates, double top_p) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.probability < b.probability; });
  double mass = 0.0;
  std::size_t dropped = 0;
  while (dropped + 1 < candidates.size() && mass + candidates[dropped].probability <= 1.0 - top_p)
    mass += candidates[dropped++].probability;
  candidates.erase(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(dropped));
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  normalise(candidates);
}

}  // namespace

void check(const SamplingSettings& settings) {
  require(std::isfinite(settings.temperature) && settings.temperature >= 0.0,
          "temperature is out of range; give 0 (greedy) or a number above it");
  require(settings.top_k >= 0, "top_k is negative; give 0 (off) or a whole number above it");
  require(settings.top_p > 0.0 && settings.top_p <= 1.0,
          "top_p is out of range; give a number above 0 and up to 1 (off)");
  require(std::isfinite(settings.repetition_penalty) && settings.repetition_penalty > 0.0,
          "repetition_penalty is out of range; give a number above 0; 1 is off");
}

std::vector<Candidate> candidates(const SamplingSettings& settings, const float* logits, std::size_t size,
                                  const std::vector<std::int64_t>& context) {
  std::vector<double> scores(logits, logits + size);
  require(std::none_of(scores.begin(), scores.end(), [](double score) { return std::isnan(score); }) &&
              std::isfinite(*std::max_element(scores.begin(), scores.end())),
          "the model's logits are not finite; export with --dtype float32 instead of float16");
  if (settings.repetition_penalty != 1.0) penalise(scores, context, settings.repetition_penalty);
  if (settings.temperature == 0.0)
    return {{std::max_element(scores.begin(), scores.end()) - scores.begin(), 1.0}};
  std::vector<Candidate> kept = most_likely(scores, settings.top_k);
  softmax(kept, settings.temperature);
  if (settings.top_p < 1.0) keep_mass(kept, settings.top_p);
  return kept;
}

std::int64_t pick(const std::vector<Candidate>& candidates, double place) {
  std::vector<double> mass;
  for (const Candidate& candidate : candidates)
    mass.push_back((mass.empty() ? 0.0 : mass.back()) + candidate.probability);
  const auto found = std::upper_bound(mass.begin(), mass.end(), place * mass.back());
  const auto last = static_cast<std::ptrdiff_t>(candidates.size()) - 1;
  return candidates[static_cast<std::size_t>(std::min(found - mass.begin(), last))].token;
}

std::int64_t Sampler::choose(const float* logits, std::size_t size,
                             const std::vector<std::int64_t>& context) {
  const std::vector<Candidate> found = candidates(settings_, logits, size, context);
  if (found.size() == 1) return found.front().token;
  // The generator's own bits: std::uniform_real_distribution differs between standard libraries.
  return pick(found, static_cast<double>(random_() >> 11) * 0x1p-53);
}

}  // namespace chai
