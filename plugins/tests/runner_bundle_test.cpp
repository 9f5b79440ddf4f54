// chai::Runner against the Python runner: bundles and their expected tokens are made by runner_fixture.py.
//
//   runner_bundle_test FIXTURE_DIRECTORY [libchai_onnxruntime.so]
//
// Ends with 77 (skipped) if there is no fixture. $CHAI_TEST_LIBRARY replaces the second argument.
#include <chai/runner.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"
#include "json.h"

namespace {

using Ids = std::vector<std::int64_t>;

constexpr int kSkipped = 77;

Ids integers(const chai::Json& json) {
  Ids ids;
  for (const chai::Json& item : json.array()) ids.push_back(item.integer());
  return ids;
}

void expect_error(const std::function<void()>& action, const std::string& part) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    EXPECT(std::string(error.what()).find(part) != std::string::npos, error.what());
    return;
  }
  EXPECT(false, "no error about: " + part);
}

void run_case(const chai::Json& json, chai::Options options, const std::string& directory) {
  const std::string where = json.at("bundle").string() + ", " + json.at("heads").string();
  options.heads = json.at("heads").string() == "all" ? chai::Heads::kAll : chai::Heads::kChai;
  options.max_batch = json.at("max_batch").integer();
  chai::Runner runner = chai::Runner::open(directory + "/" + json.at("bundle").string(), options);
  EXPECT(runner.in_place() == !options.op_library->empty(), where);

  chai::GenerateOptions settings;
  settings.max_new_tokens = json.at("max_new_tokens").integer();
  settings.max_seq = json.at("max_seq").integer();
  std::vector<Ids> prompts;
  for (const chai::Json& prompt : json.at("prompts").array()) prompts.push_back(integers(prompt));
  for (int again = 0; again < 2; ++again) {
    std::vector<Ids> streamed(prompts.size());
    const auto generations = runner.generate(prompts, settings, [&](std::size_t prompt, std::int64_t token) {
      streamed[prompt].push_back(token);
    });
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const chai::Json& wanted = json.at("results").array()[i];
      const std::string prompt = where + ", prompt " + std::to_string(i);
      EXPECT(generations[i].token_ids == integers(wanted.at("token_ids")), prompt);
      EXPECT(chai::name(generations[i].stop_reason) == wanted.at("stop_reason").string(), prompt);
      EXPECT(generations[i].prompt_tokens == static_cast<std::int64_t>(prompts[i].size()), prompt);
      EXPECT(streamed[i] == generations[i].token_ids, prompt);
    }
  }
}

void wrong_arguments_are_refused(const chai::Options& options, const std::string& bundle) {
  chai::Runner runner = chai::Runner::open(bundle, options);
  chai::GenerateOptions none;
  none.max_new_tokens = 0;
  chai::GenerateOptions tight;
  tight.max_seq = 2;
  expect_error([&] { runner.generate({{}}); }, "a prompt is empty");
  expect_error([&] { runner.generate({{-1}}); }, "token id -1");
  expect_error([&] { runner.generate({{1}}, none); }, "max_new_tokens");
  expect_error([&] { runner.generate({{1, 2, 3}}, tight); }, "raise max_seq");
  EXPECT(runner.generate({}).empty(), "no prompts, no texts");
  chai::Options missing = options;
  missing.op_library = "missing.so";
  expect_error([&] { chai::Runner::open(bundle, missing); }, "missing.so is missing");
  expect_error([&] { chai::Runner::open(bundle + "/missing", options); }, "is not a bundle");
  chai::Options tensorrt = options;
  tensorrt.backend = chai::Backend::kTensorRt;
  expect_error([&] { chai::Runner::open(bundle, tensorrt); },
               "tensorrt");  // no such back end, plugin or engine
}

void a_callback_may_throw(const chai::Options& options, const std::string& bundle) {
  chai::Runner runner = chai::Runner::open(bundle, options);
  const Ids wanted = runner.generate({{5, 9, 3}})[0].token_ids;
  const auto stop = [](std::size_t, std::int64_t) { throw std::runtime_error("enough"); };
  expect_error([&] { runner.generate({{5, 9, 3}}, {}, stop); }, "enough");
  EXPECT(runner.generate({{5, 9, 3}})[0].token_ids == wanted, "the next call is not disturbed");
}

void end_of_sequence_ids_can_be_replaced(const chai::Options& options, const std::string& bundle) {
  chai::Runner runner = chai::Runner::open(bundle, options);
  chai::GenerateOptions settings;
  settings.max_new_tokens = 12;
  settings.eos_token_ids.emplace();
  const Ids whole = runner.generate({{7, 8, 20, 21, 6, 30}}, settings)[0].token_ids;
  EXPECT(whole.size() == 12, "no token ends the text");
  settings.eos_token_ids->push_back(whole[3]);
  const Ids ended = runner.generate({{7, 8, 20, 21, 6, 30}}, settings)[0].token_ids;
  EXPECT(ended.size() <= 4 && ended.back() == whole[3], "the given token ends it");
}

}  // namespace

int main(int argc, char** argv) {
  EXPECT(argc >= 2, "usage: runner_bundle_test FIXTURE_DIRECTORY [OP_LIBRARY]");
  const std::string directory = argv[1];
  std::ifstream stream(directory + "/cases.json");
  if (!stream.is_open()) {
    std::puts("skipped: runner_fixture.py made no bundles");
    return kSkipped;
  }
  std::ostringstream text;
  text << stream.rdbuf();
  const chai::Json fixture = chai::Json::parse(text.str());

  const char* named = std::getenv("CHAI_TEST_LIBRARY");
  const std::string library = named != nullptr ? named : argc > 2 ? argv[2] : "";
  std::vector<std::string> op_libraries{""};
  if (!library.empty() && std::filesystem::exists(library)) op_libraries.push_back(library);
  for (const std::string& op_library : op_libraries) {
    chai::Options options;
    options.threads = 1;
    options.onnxruntime_library = fixture.at("onnxruntime_library").string();
    options.op_library = op_library;
    for (const chai::Json& json : fixture.at("cases").array()) run_case(json, options, directory);
    const std::string bundle = directory + "/" + fixture.at("cases").array()[0].at("bundle").string();
    wrong_arguments_are_refused(options, bundle);
    a_callback_may_throw(options, bundle);
    end_of_sequence_ids_can_be_replaced(options, bundle);
  }
  std::printf("%zu implementations of the op\n", op_libraries.size());
  return 0;
}
