// The runner without a model: the generation loop on a session that records what it is fed, choosing tokens,
// and what is refused in a manifest.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "expect.h"
#include "manifest.h"
#include "sampler.h"
#include "scheduler.h"

namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::int64_t kVocab = 50;

// Its "model" continues with the last token plus one. It keeps what it was fed, as a cache would, and checks
// that each step begins where the row's cache ends, or afresh.
class FakeSession final : public chai::Session {
 public:
  struct Fed {
    std::int32_t past;
    std::int32_t length;
  };

  bool grows = true;
  bool bounded = true;
  std::int64_t longest = kUnlimited;
  std::vector<std::vector<Fed>> fed;  // per row
  std::vector<std::int64_t> capacities;

  bool in_place() const override { return bounded; }
  bool can_grow() const override { return grows; }
  std::int64_t max_tokens() const override { return longest; }
  std::int64_t capacity() const override { return capacities.back(); }
  void begin(std::int64_t batch, std::int64_t capacity) override {
    capacities = {capacity};
    rows_.assign(static_cast<std::size_t>(batch), {});
    fed.assign(static_cast<std::size_t>(batch), {});
  }
  void grow(std::int64_t capacity) override {
    EXPECT(grows && capacity > capacities.back(), "grows only where it can");
    capacities.push_back(capacity);
  }
  const std::vector<float>& step(const chai::Step& step) override {
    const std::size_t tokens = step.input_ids.size() / rows_.size();
    logits_.assign(rows_.size() * kVocab, 0.0f);
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      const std::int32_t past = step.past_lengths[row];
      const std::int32_t length = step.lengths[row];
      if (length == 0) continue;
      EXPECT(length <= longest && past + length <= capacities.back(), "a step fits");
      EXPECT(past == 0 || past == static_cast<std::int32_t>(rows_[row].size()), "no gap in a cache");
      if (past == 0) rows_[row].clear();
      const auto first = step.input_ids.begin() + static_cast<std::ptrdiff_t>(row * tokens);
      rows_[row].insert(rows_[row].end(), first, first + length);
      EXPECT(step.output_positions[row] == length - 1, "logits of the last token");
      const std::int64_t next = (rows_[row].back() + 1) % kVocab;
      logits_[row * kVocab + static_cast<std::size_t>(next)] = 1.0f;
      fed[row].push_back({past, length});
      EXPECT(fed[row].size() < 10000, "a loop that makes no progress");
    }
    return logits_;
  }

 private:
  std::vector<Ids> rows_;
  std::vector<float> logits_;
};

std::vector<chai::Request> run(FakeSession& session, const std::vector<Ids>& prompts, chai::Limits limits,
                               std::size_t slots = 8, const chai::OnToken& on_token = {},
                               std::int64_t query_heads = 4) {
  std::vector<chai::Request> requests;
  for (const Ids& prompt : prompts)
    requests.push_back({requests.size(), prompt, static_cast<std::int64_t>(prompt.size()),
                        chai::Sampler({}, 0), 0, chai::StopReason::kLength});
  chai::Scheduler(session, {query_heads, 5, kVocab}, limits, on_token).run(requests, slots);
  return requests;
}

Ids text(const chai::Request& request) {
  return {request.ids.begin() + request.prompt_tokens, request.ids.end()};
}

void short_prompts_are_fed_again_until_the_probe_is_whole() {
  FakeSession session;
  const auto requests = run(session, {{7, 8}}, {6, 1000, {}});
  EXPECT(text(requests[0]) == (Ids{9, 10, 11, 12, 13, 14}), "the text");
  const std::vector<std::pair<int, int>> wanted{{0, 2}, {0, 3}, {0, 4}, {0, 5}, {5, 1}, {6, 1}};
  EXPECT(session.fed[0].size() == wanted.size(), "steps");
  for (std::size_t i = 0; i < wanted.size(); ++i)
    EXPECT(session.fed[0][i].past == wanted[i].first && session.fed[0][i].length == wanted[i].second,
           "step " + std::to_string(i));
}

void long_prompts_are_fed_in_chunks() {
  FakeSession session;
  session.longest = 100;
  run(session, {Ids(250, 3), {1}}, {2, 1000, {}});
  const auto& fed = session.fed[0];
  EXPECT(fed[0].length == 100 && fed[1].past == 100 && fed[2].past == 200 && fed[2].length == 50, "chunks");
  FakeSession unbounded;
  unbounded.bounded = false;
  run(unbounded, {Ids(2000, 3)}, {2, 4000, {}});
  EXPECT(unbounded.fed[0][0].length == 512, "2^26 score elements are not reached");
  run(unbounded, {Ids(12, 3)}, {2, 4000, {}}, 1, {}, std::int64_t{1} << 20);
  EXPECT(unbounded.fed[0][0].length == 5 && unbounded.fed[0][1].past == 5, "the first chunk holds the probe");
}

void caches_grow_and_stop_at_the_last_position() {
  FakeSession session;
  const auto requests = run(session, {{1, 2, 3}}, {1000, 200, {}});
  EXPECT(session.capacities == (std::vector<std::int64_t>{128, 200}), "capacity doubles up to the limit");
  EXPECT(requests[0].stop_reason == chai::StopReason::kCapacity, "stop reason");
  EXPECT(requests[0].ids.size() == 201, "a token can be chosen after the last position");
  FakeSession fixed;
  fixed.grows = false;
  run(fixed, {{1, 2, 3}}, {1000, 200, {}});
  EXPECT(fixed.capacities == std::vector<std::int64_t>{200}, "all that may be needed at once");
}

void rows_are_reused_and_end_by_themselves() {
  FakeSession session;
  std::vector<Ids> seen(5);
  const std::vector<Ids> prompts{{1}, {20, 21, 22, 23, 24, 25}, {30}, {40, 41}, {5, 5, 5, 5, 5, 5, 5}};
  const auto requests = run(session, prompts, {10, 1000, {27, 44}}, 2,
                            [&](std::size_t row, std::int64_t token) { seen[row].push_back(token); });
  EXPECT(session.fed.size() == 2, "two rows");
  EXPECT(text(requests[1]) == (Ids{26, 27}) && requests[1].stop_reason == chai::StopReason::kEos, "ends");
  EXPECT(text(requests[3]) == (Ids{42, 43, 44}) && requests[3].stop_reason == chai::StopReason::kEos, "ends");
  EXPECT(text(requests[4]) == (Ids{6, 7, 8, 9, 10, 11, 12, 13, 14, 15}), "its text");
  for (std::size_t i = 0; i < prompts.size(); ++i) EXPECT(seen[i] == text(requests[i]), "callback");
}

void sampling_follows_its_settings() {
  const std::vector<float> logits{0.0f, 2.0f, 1.0f, 2.0f};
  const auto draw = [&](chai::SamplingSettings settings, std::uint64_t seed, const Ids& context = {}) {
    chai::Sampler sampler(settings, seed);
    Ids drawn;
    for (int i = 0; i < 200; ++i) drawn.push_back(sampler.choose(logits.data(), logits.size(), context));
    return drawn;
  };
  EXPECT(draw({}, 0)[0] == 1, "greedy takes the lower of two equal tokens");
  EXPECT(draw({0.0, 0, 1.0, 4.0}, 0, {1, 3})[0] == 2, "the penalty halves tokens seen before");
  const auto count = [](const Ids& drawn, std::int64_t token) {
    return std::count(drawn.begin(), drawn.end(), token);
  };
  const Ids all = draw({1.0}, 1);
  EXPECT(count(all, 0) > 0 && count(all, 2) > count(all, 0), "every token has its chance");
  EXPECT(all == draw({1.0}, 1) && all != draw({1.0}, 2), "the seed decides");
  const Ids two = draw({1.0, 1}, 1);
  EXPECT(count(two, 1) > 50 && count(two, 3) > 50 && count(two, 2) == 0, "ties with the k-th stay");
  EXPECT(count(draw({1.0, 0, 0.8}, 1), 0) == 0, "top_p drops the least likely");
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

void wrong_manifests_are_refused() {
  const auto directory = std::filesystem::temp_directory_path() / "chai_runner_parts_test";
  const auto read = [&](const std::string& from, const std::string& to) {
    std::string json =
        R"({"format": "chai-bundle/1", "op_version": 1, "dtype": "float32", "num_layers": 2,
            "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_head_dim": 8, "vocab_size": 50,
            "max_positions": null, "kept_heads": [1, 2], "probe_tokens": 5, "proof": {"max_abs_diff": 1.5e-3},
            "generation": {"eos_token_ids": [3], "top_p": 0.25}, "source": {"name": "caf\u0009é"},
            "files": {"model.onnx": {"sha256": "00", "size": 2}}, "engines": {}})";
    if (!from.empty()) json.replace(json.find(from), from.size(), to);
    std::filesystem::create_directories(directory);
    std::ofstream(directory / "manifest.json") << json;
    std::ofstream(directory / "model.onnx") << "ok";
    return chai::read_manifest(directory.string());
  };
  const chai::Manifest manifest = read("", "");
  EXPECT(manifest.top_p == 0.25 && manifest.eos_token_ids == Ids{3} && !manifest.max_positions, "fields");
  EXPECT(manifest.cached_heads(chai::Heads::kChai, 0) == 1, "kept heads");
  EXPECT(manifest.cached_heads(chai::Heads::kAll, 0) == 2, "all heads");
  expect_error([&] { read("chai-bundle/1", "chai-bundle/2"); }, "reads chai-bundle/1");
  expect_error([&] { read("\"op_version\": 1", "\"op_version\": 2"); }, "op_version is 2");
  expect_error([&] { read("[1, 2]", "[1, 3]"); }, "kept_heads has 3");
  expect_error([&] { read("[1, 2]", "[1]"); }, "one number per layer");
  EXPECT(manifest.has_cache(1) && manifest.num_caches() == 2, "a cache in every layer");
  const chai::Manifest shared = read("[1, 2]", "[2, 2], \"kv_source_layers\": [0, 0]");
  EXPECT(shared.has_cache(0) && !shared.has_cache(1) && shared.num_caches() == 1, "one cache for two layers");
  expect_error([&] { read("[1, 2]", "[1, 2], \"kv_source_layers\": [0]"); }, "kv_source_layers has not one");
  expect_error([&] { read("[1, 2]", "[1, 2], \"kv_source_layers\": [1, 1]"); }, "which has none before it");
  expect_error([&] { read("[1, 2]", "[1, 2], \"kv_source_layers\": [0, 0]"); }, "keeps other heads");
  expect_error([&] { read("\"head_dim\": 8", "\"head_dim\": \"x\""); }, "'/head_dim': expected an integer");
  expect_error([&] { read("float32", "int8"); }, "dtype is int8");
  expect_error([&] { read("\"size\": 2", "\"size\": 3"); }, "its size differs");
  expect_error([&] { read("{", "["); }, "JSON");
  std::filesystem::remove_all(directory);
  expect_error([&] { chai::read_manifest(directory.string()); }, "is not a bundle");
}

}  // namespace

int main() {
  short_prompts_are_fed_again_until_the_probe_is_whole();
  long_prompts_are_fed_in_chunks();
  caches_grow_and_stop_at_the_last_position();
  rows_are_reused_and_end_by_themselves();
  sampling_follows_its_settings();
  wrong_manifests_are_refused();
  return 0;
}
