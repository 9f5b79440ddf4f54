// The generation loop on a session that records what it is fed.
#include "runner/scheduler.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <utility>
#include <vector>

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

  bool in_place() const override { return true; }
  bool bounded_scratch() const override { return bounded; }
  bool can_grow() const override { return grows; }
  std::int64_t max_tokens() const override { return longest; }
  std::int64_t capacity() const override { return capacities.back(); }
  void begin(std::int64_t batch, std::int64_t capacity) override {
    capacities = {capacity};
    rows_.assign(static_cast<std::size_t>(batch), {});
    fed.assign(static_cast<std::size_t>(batch), {});
  }
  void grow(std::int64_t capacity) override {
    REQUIRE(grows);
    REQUIRE(capacity > capacities.back());
    capacities.push_back(capacity);
  }
  const std::vector<float>& step(const chai::Step& step) override {
    const std::size_t tokens = step.input_ids.size() / rows_.size();
    logits_.assign(rows_.size() * kVocab, 0.0f);
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      const std::int32_t past = step.past_lengths[row];
      const std::int32_t length = step.lengths[row];
      if (length == 0) continue;
      REQUIRE(length <= longest);
      REQUIRE(past + length <= capacities.back());
      if (past == 0) rows_[row].clear();
      REQUIRE(past == static_cast<std::int32_t>(rows_[row].size()));  // no gap in a cache
      const auto first = step.input_ids.begin() + static_cast<std::ptrdiff_t>(row * tokens);
      rows_[row].insert(rows_[row].end(), first, first + length);
      REQUIRE(step.output_positions[row] == length - 1);
      const std::int64_t next = (rows_[row].back() + 1) % kVocab;
      logits_[row * kVocab + static_cast<std::size_t>(next)] = 1.0f;
      fed[row].push_back({past, length});
      REQUIRE(fed[row].size() < 10000);  // a loop that makes no progress
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
  chai::Geometry geometry;
  geometry.num_query_heads = query_heads;
  geometry.probe_tokens = 5;
  geometry.vocab_size = kVocab;
  chai::Scheduler(session, geometry, limits, on_token).run(requests, slots);
  return requests;
}

Ids text(const chai::Request& request) {
  return {request.ids.begin() + request.prompt_tokens, request.ids.end()};
}

TEST_CASE("short prompts are fed again until the probe is whole") {
  FakeSession session;
  const auto requests = run(session, {{7, 8}}, {6, 1000, {}});
  CHECK(text(requests[0]) == Ids{9, 10, 11, 12, 13, 14});
  const std::vector<std::pair<int, int>> wanted{{0, 2}, {0, 3}, {0, 4}, {0, 5}, {5, 1}, {6, 1}};
  REQUIRE(session.fed[0].size() == wanted.size());
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    CAPTURE(i);
    CHECK(session.fed[0][i].past == wanted[i].first);
    CHECK(session.fed[0][i].length == wanted[i].second);
  }
}

TEST_CASE("long prompts are fed in chunks") {
  FakeSession session;
  session.longest = 100;
  run(session, {Ids(250, 3), {1}}, {2, 1000, {}});
  const auto& fed = session.fed[0];
  CHECK(fed[0].length == 100);
  CHECK(fed[1].past == 100);
  CHECK(fed[2].past == 200);
  CHECK(fed[2].length == 50);
  FakeSession unbounded;
  unbounded.bounded = false;
  run(unbounded, {Ids(2000, 3)}, {2, 4000, {}});
  CHECK(unbounded.fed[0][0].length == 512);  // 2^26 score elements are not reached
  run(unbounded, {Ids(12, 3)}, {2, 4000, {}}, 1, {}, std::int64_t{1} << 20);
  CHECK(unbounded.fed[0][0].length == 5);  // the first chunk holds the probe
  CHECK(unbounded.fed[0][1].past == 5);
}

TEST_CASE("caches grow and stop at the last position") {
  FakeSession session;
  const auto requests = run(session, {{1, 2, 3}}, {1000, 200, {}});
  CHECK(session.capacities == Ids{128, 200});  // doubled up to the limit
  CHECK(requests[0].stop_reason == chai::StopReason::kCapacity);
  CHECK(requests[0].ids.size() == 201);  // a token can be chosen after the last position
  FakeSession fixed;
  fixed.grows = false;
  run(fixed, {{1, 2, 3}}, {1000, 200, {}});
  CHECK(fixed.capacities == Ids{200});  // all that may be needed at once
}

TEST_CASE("rows are reused and end by themselves") {
  FakeSession session;
  std::vector<Ids> seen(5);
  const std::vector<Ids> prompts{{1}, {20, 21, 22, 23, 24, 25}, {30}, {40, 41}, {5, 5, 5, 5, 5, 5, 5}};
  const auto requests = run(session, prompts, {10, 1000, {27, 44}}, 2,
                            [&](std::size_t row, std::int64_t token) { seen[row].push_back(token); });
  CHECK(session.fed.size() == 2);
  CHECK(text(requests[1]) == Ids{26, 27});
  CHECK(requests[1].stop_reason == chai::StopReason::kEos);
  CHECK(text(requests[3]) == Ids{42, 43, 44});
  CHECK(requests[3].stop_reason == chai::StopReason::kEos);
  CHECK(text(requests[4]) == Ids{6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  for (std::size_t i = 0; i < prompts.size(); ++i) CHECK(seen[i] == text(requests[i]));
}

}  // namespace
