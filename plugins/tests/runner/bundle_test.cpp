// chai::Runner against the Python runner: bundles and their expected tokens are made by fixture.py.
#include <chai/runner.h>
#include <doctest/doctest.h>

#include <stdexcept>
#include <string>
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
  for (const chai::Options& options : all_options())
    for (const chai::Json& json : chai::test::fixture().content.at("cases").array()) run_case(json, options);
}

#define CHECK_ERROR(action, part) CHECK_THROWS_WITH_AS(action, doctest::Contains(part), std::runtime_error)

TEST_CASE("wrong arguments are refused") {
  for (const chai::Options& options : all_options()) {
    chai::Runner runner = chai::Runner::open(path_of("mha"), options);
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
    CHECK_ERROR(chai::Runner::open(path_of("mha"), missing), "missing.so is missing");
    CHECK_ERROR(chai::Runner::open(path_of("missing"), options), "is not a bundle");
    chai::Options tensorrt = options;
    tensorrt.backend = chai::Backend::kTensorRt;
    // No such back end, plugin or engine.
    CHECK_ERROR(chai::Runner::open(path_of("mha"), tensorrt), "tensorrt");
  }
}

TEST_CASE("a callback may throw, and the next call is not disturbed") {
  for (const chai::Options& options : all_options()) {
    chai::Runner runner = chai::Runner::open(path_of("mha"), options);
    const Ids wanted = runner.generate({{5, 9, 3}})[0].token_ids;
    const auto stop = [](std::size_t, std::int64_t) { throw std::runtime_error("enough"); };
    CHECK_ERROR(runner.generate({{5, 9, 3}}, {}, stop), "enough");
    CHECK(runner.generate({{5, 9, 3}})[0].token_ids == wanted);
  }
}

TEST_CASE("end-of-sequence ids can be replaced") {
  for (const chai::Options& options : all_options()) {
    chai::Runner runner = chai::Runner::open(path_of("mha"), options);
    chai::GenerateOptions settings;
    settings.max_new_tokens = 12;
    settings.eos_token_ids.emplace();
    const Ids whole = runner.generate({{7, 8, 20, 21, 6, 30}}, settings)[0].token_ids;
    CHECK(whole.size() == 12);
    settings.eos_token_ids->push_back(whole[3]);
    const Ids ended = runner.generate({{7, 8, 20, 21, 6, 30}}, settings)[0].token_ids;
    CHECK(ended.size() <= 4);
    CHECK(ended.back() == whole[3]);
  }
}

}  // namespace
