// Choosing tokens. tests/data/sampling_cases.json holds this sampler and Python's to the same.
#include "runner/sampler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/data.h"

namespace {

using chai::Json;
using Ids = std::vector<std::int64_t>;

// A number, or the name of one that JSON does not have.
double real(const Json& json) {
  if (json.kind() != Json::Kind::kString) return json.real();
  if (json.string() == "nan") return std::numeric_limits<double>::quiet_NaN();
  REQUIRE(json.string().find("inf") != std::string::npos);
  return json.string() == "-inf" ? -INFINITY : INFINITY;
}

std::vector<float> logits_of(const Json& json) {
  std::vector<float> logits;
  for (const Json& logit : json.array()) logits.push_back(static_cast<float>(real(logit)));
  return logits;
}

chai::SamplingSettings settings_of(const Json& json) {
  chai::SamplingSettings settings;
  for (const auto& [name, value] : json.members()) {
    CAPTURE(name);
    if (name == "top_k") {
      settings.top_k = value.integer();
      continue;
    }
    double* const field = name == "temperature"          ? &settings.temperature
                          : name == "top_p"              ? &settings.top_p
                          : name == "repetition_penalty" ? &settings.repetition_penalty
                                                         : nullptr;
    REQUIRE(field != nullptr);
    *field = real(value);
  }
  return settings;
}

const Json& table() {
  static const Json json = chai::test::read_data("sampling_cases.json");
  return json;
}

TEST_CASE("settings are taken or refused as the table says") {
  for (const Json& settings : table().at("usable").array()) {
    CAPTURE(settings.text());
    CHECK_NOTHROW(chai::check(settings_of(settings)));
  }
  for (const Json& settings : table().at("unusable").array()) {
    CAPTURE(settings.text());
    CHECK_THROWS_AS(chai::check(settings_of(settings)), std::runtime_error);
  }
}

TEST_CASE("tokens are drawn from the table's distributions") {
  for (const Json& choice : table().at("choices").array()) {
    CAPTURE(choice.at("name").string());
    const std::vector<float> logits = logits_of(choice.at("logits"));
    Ids context;
    if (const auto ids = choice.find("context"))
      for (const Json& id : ids->array()) context.push_back(id.integer());
    const auto found =
        chai::candidates(settings_of(choice.at("settings")), logits.data(), logits.size(), context);
    const std::vector<Json> tokens = choice.at("tokens").array();
    const std::vector<Json> probabilities = choice.at("probabilities").array();
    REQUIRE(found.size() == tokens.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      CHECK(found[i].token == tokens[i].integer());
      CHECK(std::abs(found[i].probability - probabilities[i].real()) <= 1e-12);
    }
  }
}

TEST_CASE("logits that are not finite are refused at any setting") {
  for (const Json& unusable : table().at("unusable_logits").array()) {
    CAPTURE(unusable.text());
    const std::vector<float> logits = logits_of(unusable);
    for (const double temperature : {0.0, 1.0})
      CHECK_THROWS_AS(chai::candidates({temperature}, logits.data(), logits.size(), {}), std::runtime_error);
  }
}

TEST_CASE("a place in the mass picks its token, and none of probability 0") {
  const std::vector<chai::Candidate> candidates{{3, 0.0}, {5, 0.25}, {6, 0.5}, {8, 0.25}, {9, 0.0}};
  for (const auto& [place, token] : std::vector<std::pair<double, std::int64_t>>{
           {0.0, 5}, {0.2499, 5}, {0.25, 6}, {0.7499, 6}, {0.75, 8}, {1.0 - 0x1p-53, 8}}) {
    CAPTURE(place);
    CHECK(chai::pick(candidates, place) == token);
  }
}

TEST_CASE("the seed decides, and every token has its chance") {
  const std::vector<float> logits{0.0f, 2.0f, 1.0f, 2.0f};
  const auto draw = [&](std::uint64_t seed) {
    chai::Sampler sampler({1.0}, seed);
    Ids drawn;
    for (int i = 0; i < 200; ++i) drawn.push_back(sampler.choose(logits.data(), logits.size(), {}));
    return drawn;
  };
  const Ids all = draw(1);
  CHECK(all == draw(1));
  CHECK(all != draw(2));
  CHECK(std::count(all.begin(), all.end(), 0) > 0);
  CHECK(std::count(all.begin(), all.end(), 2) > std::count(all.begin(), all.end(), 0));
}

}  // namespace
