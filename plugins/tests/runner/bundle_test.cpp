// chai::Runner against the Python runner: bundles and their expected tokens are made by fixture.py.
#include <chai/runner.h>
#include <doctest/doctest.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/runner/fixture.h"

namespace {

using Ids = std::vector<std::int64_t>;

Ids integers(const chai::Json& json) {
  Ids ids;
  for (const chai::Json& item : json.array()) ids.push_back(item.integer());
  return ids;
}

// For each implementation of the op.
std::vector<chai::Options> all_options() {
  std::vector<chai::Options> all;
  for (const std::string& op_library : chai::test::fixture().op_libraries) {
    chai::Options options;
    options.threads = 1;
    options.onnxruntime_library = chai::test::fixture().onnxruntime_library();
    options.op_library = op_library;
    all.push_back(options);
  }
  return all;
}

std::string path_of(const std::string& bundle) {
  return chai::test::fixture().directory + "/" + bundle;
}

void run_case(const chai::Json& json, chai::Options options) {
  const std::string bundle = json.at("bundle").string();
  const std::string heads = json.at("heads").string();
  CAPTURE(bundle);
  CAPTURE(heads);
  CAPTURE(*options.op_library);
  options.heads = heads == "all" ? chai::Heads::kAll : chai::Heads::kChai;
  options.max_batch = json.at("max_batch").integer();
  options.cache_memory = json.at("cache_memory").integer();
  chai::Runner runner = chai::Runner::open(path_of(bundle), options);
  CHECK(runner.in_place() == !options.op_library->empty());

  chai::GenerateOptions settings;
  settings.max_new_tokens = json.at("max_new_tokens").integer();
  settings.max_seq = json.at("max_seq").integer();
  std::vector<Ids> prompts;
  for (const chai::Json& prompt : json.at("prompts").array()) prompts.push_back(integers(prompt));
  const std::vector<chai::Json> results = json.at("results").array();
  for (int again = 0; again < 2; ++again) {
    std::vector<Ids> streamed(prompts.size());
    const auto generations = runner.generate(prompts, settings, [&](std::size_t prompt, std::int64_t token) {
      streamed[prompt].push_back(token);
    });
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      CAPTURE(i);
      CHECK(generations[i].token_ids == integers(results[i].at("token_ids")));
      CHECK(chai::name(generations[i].stop_reason) == results[i].at("stop_reason").string());
      CHECK(generations[i].prompt_tokens == static_cast<std::int64_t>(prompts[i].size()));
      CHECK(streamed[i] == generations[i].token_ids);
    }
  }
}

TEST_CASE("the texts are the Python runner's") {
  for (const chai::Json& json : chai::test::fixture().content.at("cases").array())
    for (const chai::Options& options : all_options()) run_case(json, options);
}

#define CHECK_ERROR(action, part) CHECK_THROWS_WITH_AS(action, doctest::Contains(part), std::runtime_error)

void for_each_implementation(const std::function<void(const std::string&, const chai::Options&)>& check) {
  for (const chai::Options& options : all_options()) check(path_of("mha"), options);
}

TEST_CASE("wrong arguments are refused") {
  for_each_implementation([](const std::string& bundle, const chai::Options& options) {
    chai::Runner runner = chai::Runner::open(bundle, options);
    chai::GenerateOptions none;
    none.max_new_tokens = 0;
    chai::GenerateOptions tight;
    tight.max_seq = 2;
    CHECK_ERROR(runner.generate({{}}), "a prompt is empty");
    CHECK_ERROR(runner.generate({{-1}}), "token id -1");
    CHECK_ERROR(runner.generate({{1}}, none), "max_new_tokens");
    CHECK_ERROR(runner.generate({{1, 2, 3}}, tight), "raise max_seq");
    CHECK(runner.generate({}).empty());
    chai::Options missing = options;
    missing.op_library = "missing.so";
    CHECK_ERROR(chai::Runner::open(bundle, missing), "missing.so is missing");
    CHECK_ERROR(chai::Runner::open(path_of("missing"), options), "is not a bundle");
    chai::Options tensorrt = options;
    tensorrt.backend = chai::Backend::kTensorRt;
    // No such back end, plugin or engine.
    CHECK_ERROR(chai::Runner::open(bundle, tensorrt), "tensorrt");
    chai::Options negative = options;
    negative.cache_memory = -1;
    CHECK_ERROR(chai::Runner::open(bundle, negative), "cache_memory is negative");
  });
}

TEST_CASE("a prompt that the pool cannot hold is refused, and a text that fills it ends") {
  for (chai::Options options : all_options()) {
    const bool in_place = !options.op_library->empty();
    const std::int64_t length = chai::test::fixture().content.at("page_length").integer();
    // A position of "mha": in both layers four value heads of 4 floats, in K two and three heads of 8.
    options.cache_memory = length * 4 * (2 * 4 * 4 + (2 + 3) * 8) * (in_place ? 1 : 2);
    chai::Runner runner = chai::Runner::open(path_of("mha"), options);
    const std::string wanted =
        "tokens and " + std::to_string(length) + " fit; shorten it or raise cache_memory (";
    CHECK_ERROR(runner.generate({{5, 9}, Ids(static_cast<std::size_t>(length) + 1, 4)}), wanted.c_str());
    chai::GenerateOptions settings;
    settings.max_new_tokens = 2 * length;
    const auto texts = runner.generate({{5, 9}, Ids(static_cast<std::size_t>(length), 4)}, settings);
    CHECK(texts[0].token_ids.size() == static_cast<std::size_t>(length) - 1);
    CHECK(texts[1].token_ids.size() == 1);
    for (const auto& text : texts) CHECK(text.stop_reason == chai::StopReason::kCapacity);
    options.cache_memory = 1;
    CHECK_ERROR(chai::Runner::open(path_of("mha"), options).generate({{5, 9}}),
                "a prompt has 2 tokens and 0 fit; shorten it or raise cache_memory (1 B)");
  }
}

TEST_CASE("a seed gives the same text alone and in company") {
  chai::GenerateOptions settings;
  settings.temperature = 0.8;
  settings.top_k = 10;
  settings.seed = 5;
  const std::vector<Ids> prompts{{7, 8, 20, 21, 6, 30}, {5, 9}, Ids(150, 3)};
  std::vector<Ids> wanted;
  const auto check = [&](const std::string& bundle, const chai::Options& options,
                         std::vector<Ids>& expected) {
    chai::Runner runner = chai::Runner::open(bundle, options);
    const auto texts = runner.generate(prompts, settings);
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      if (expected.size() <= i) expected.push_back(texts[i].token_ids);
      CHECK(texts[i].token_ids == expected[i]);
      CHECK(runner.generate({prompts[i]}, settings)[0].token_ids == expected[i]);
    }
  };
  for (const chai::Options& options : all_options()) check(path_of("mha"), options, wanted);
  std::vector<Ids> quantised;
  for (const chai::Options& options : all_options()) check(path_of("8-4"), options, quantised);
}

TEST_CASE("a callback may throw, and the next call is not disturbed") {
  for_each_implementation([](const std::string& bundle, const chai::Options& options) {
    chai::Runner runner = chai::Runner::open(bundle, options);
    const std::vector<Ids> prompts{{5, 9, 3}, {4, 4, 4, 4, 4, 4, 4}};
    const Ids wanted = runner.generate(prompts)[0].token_ids;
    int calls = 0;
    const auto stop = [&](std::size_t, std::int64_t) {
      if (++calls == 5) throw std::runtime_error("enough");
    };
    CHECK_ERROR(runner.generate(prompts, {}, stop), "enough");
    CHECK(runner.generate(prompts)[0].token_ids == wanted);
  });
}

TEST_CASE("end-of-sequence ids can be replaced") {
  for_each_implementation([](const std::string& bundle, const chai::Options& options) {
    chai::Runner runner = chai::Runner::open(bundle, options);
    chai::GenerateOptions settings;
    settings.max_new_tokens = 12;
    settings.eos_token_ids.emplace();
    const Ids whole = runner.generate({{7, 8, 20, 21, 6, 30}}, settings)[0].token_ids;
    CHECK(whole.size() == 12);
    settings.eos_token_ids->push_back(whole[3]);
    const Ids ended = runner.generate({{7, 8, 20, 21, 6, 30}}, settings)[0].token_ids;
    CHECK(ended.size() <= 4);
    CHECK(ended.back() == whole[3]);
  });
}

}  // namespace
