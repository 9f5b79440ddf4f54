// Choosing tokens.
#include "runner/sampler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Ids = std::vector<std::int64_t>;

TEST_CASE("sampling follows its settings") {
  const std::vector<float> logits{0.0f, 2.0f, 1.0f, 2.0f};
  const auto draw = [&](chai::SamplingSettings settings, std::uint64_t seed, const Ids& context = {}) {
    chai::Sampler sampler(settings, seed);
    Ids drawn;
    for (int i = 0; i < 200; ++i) drawn.push_back(sampler.choose(logits.data(), logits.size(), context));
    return drawn;
  };
  CHECK(draw({}, 0)[0] == 1);                          // greedy takes the lower of two equal tokens
  CHECK(draw({0.0, 0, 1.0, 4.0}, 0, {1, 3})[0] == 2);  // tokens seen before are worth less
  const auto count = [](const Ids& drawn, std::int64_t token) {
    return std::count(drawn.begin(), drawn.end(), token);
  };
  const Ids all = draw({1.0}, 1);
  CHECK(count(all, 0) > 0);  // every token has its chance
  CHECK(count(all, 2) > count(all, 0));
  CHECK(all == draw({1.0}, 1));
  CHECK(all != draw({1.0}, 2));
  const Ids two = draw({1.0, 1}, 1);
  CHECK(count(two, 1) > 50);
  CHECK(count(two, 3) > 50);  // ties with the k-th stay
  CHECK(count(two, 2) == 0);
  CHECK(count(draw({1.0, 0, 0.8}, 1), 0) == 0);  // top_p drops the least likely
}

}  // namespace
