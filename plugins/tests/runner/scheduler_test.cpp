// The generation loop, on a session that records what it is fed.
#include "runner/scheduler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "runner/pages.h"

namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::int64_t kVocab = 50;
constexpr std::int64_t kPage = 4;
constexpr std::int64_t kPlenty = 1 << 20;

// Its "model" continues with the last token plus one. What a row was fed lies in the pages that it holds.
class FakeSession final : public chai::Session {
 public:
  // Rows and tokens per row of a call, padding included.
  using Shape = std::pair<std::size_t, std::int64_t>;

  bool bounded = true;
  std::int64_t room_pages = kPlenty;
  std::int64_t memory_pages = kPlenty;  // there is memory for so many
  std::vector<Shape> shapes;
  chai::PagePool pool;

  bool in_place() const override { return true; }
  bool bounded_scratch() const override { return bounded; }
  std::int64_t page_length() const override { return kPage; }
  std::int64_t capacity() const override { return longest_; }
  Room room() const override { return {room_pages * kPage, {room_pages, "mend it"}}; }
  void drop() override { pool = chai::PagePool(); }
  void start(std::int64_t, std::int64_t pages) override {
    shapes.clear();
    pool = chai::PagePool(pages, kPage);
    cells_.assign(static_cast<std::size_t>(pages * kPage), -1);
    longest_ = 0;
  }
  bool promise(std::int64_t row, std::int64_t tokens) override {
    if (pool.touched() + pool.untouched_after(row, tokens) > memory_pages) return false;
    longest_ = std::max(longest_, tokens);
    return pool.promise(row, tokens);
  }
  void release(std::int64_t row) override { pool.release(row); }

  const std::vector<float>& step(const chai::Step& step, const Ids& rows) override {
    const std::size_t tokens = step.input_ids.size() / rows.size();
    shapes.emplace_back(rows.size(), tokens);
    REQUIRE(shapes.size() < 10000);  // a loop that makes no progress
    logits_.assign(rows.size() * kVocab, 0.0f);
    for (std::size_t line = 0; line < rows.size(); ++line) {
      const std::int64_t past = step.past_lengths[line];
      const std::int64_t length = step.lengths[line];
      REQUIRE(length >= 1);
      REQUIRE(step.output_positions[line] == length - 1);
      pool.extend(rows[line], past + length);
      for (std::int64_t i = 0; i < length; ++i)
        cell(rows[line], past + i) = step.input_ids[line * tokens + static_cast<std::size_t>(i)];
      // No gap, and nothing of another row.
      for (std::int64_t i = 1; i < past + length; ++i) REQUIRE(cell(rows[line], i) >= 0);
      const std::int64_t next = (cell(rows[line], past + length - 1) + 1) % kVocab;
      logits_[line * kVocab + static_cast<std::size_t>(next)] = 1.0f;
    }
    return logits_;
  }

 private:
  std::int64_t& cell(std::int64_t row, std::int64_t position) {
    const std::int64_t page = pool.pages_of(row).at(static_cast<std::size_t>(position / kPage));
    return cells_.at(static_cast<std::size_t>(page * kPage + position % kPage));
  }

  std::int64_t longest_ = 0;
  Ids cells_;
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

// What a prompt is continued with.
Ids counted(const Ids& prompt, std::size_t tokens) {
  Ids text;
  for (std::size_t i = 1; i <= tokens; ++i)
    text.push_back((prompt.back() + static_cast<std::int64_t>(i)) % kVocab);
  return text;
}

Ids text(const chai::Request& request) {
  return {request.ids.begin() + request.prompt_tokens, request.ids.end()};
}

const std::vector<Ids> kPrompts{{1}, Ids(29, 7), {30}, {40, 41, 42, 43, 44, 45}, {5, 5, 5, 5, 5, 5, 5}};

TEST_CASE("texts are those of their prompts, whatever the rows and the room") {
  for (const std::size_t slots : {1, 2, 8}) {
    for (const std::int64_t pages : {11, 12, 19, 40}) {  // the longest text needs 11
      CAPTURE(slots);
      CAPTURE(pages);
      FakeSession session;
      session.room_pages = pages;
      std::vector<Ids> seen(kPrompts.size());
      const auto requests = run(session, kPrompts, {14, 1000, {}}, slots,
                                [&](std::size_t row, std::int64_t token) { seen[row].push_back(token); });
      for (std::size_t i = 0; i < kPrompts.size(); ++i) {
        CHECK(text(requests[i]) == counted(kPrompts[i], 14));
        CHECK(seen[i] == text(requests[i]));
        CHECK(requests[i].stop_reason == chai::StopReason::kLength);
      }
      CHECK(session.pool.held() == 0);
      CHECK(session.pool.outstanding() == 0);
      CHECK(session.pool.pages() <= pages);
    }
  }
}

TEST_CASE("pools are as large as the longest texts that run together need") {
  FakeSession session;
  run(session, {{1}, Ids(29, 7), {40, 41, 42, 43, 44, 45}}, {7, 32, {}}, 2);
  CHECK(session.pool.pages() == 32 / kPage + 3);  // max_positions, and 12 tokens
}

TEST_CASE("rows that decode are not padded to a prompt") {
  FakeSession session;
  std::vector<Ids> prompts(7, Ids{1, 2, 3, 4, 5});
  prompts.emplace_back(1036, 3);
  const auto requests = run(session, prompts, {6, 2000, {}});
  using Shape = FakeSession::Shape;
  REQUIRE(session.shapes.size() > 6);
  CHECK(std::vector<Shape>(session.shapes.begin(), session.shapes.begin() + 6) ==
        std::vector<Shape>{{7, 5}, {1, 512}, {7, 1}, {1, 512}, {7, 1}, {1, 12}});
  std::int64_t computed = 0, fed = 0;
  for (const auto& [rows, tokens] : session.shapes) computed += static_cast<std::int64_t>(rows) * tokens;
  for (const auto& request : requests) fed += static_cast<std::int64_t>(request.ids.size()) - 1;
  CHECK(computed == fed);
}

TEST_CASE("rows whose text has ended are in no call") {
  FakeSession session;
  std::vector<Ids> prompts;
  for (std::size_t row = 0; row < 8; ++row) prompts.emplace_back(6 + row, 3);
  const auto requests = run(session, prompts, {10, 15, {}});
  std::vector<std::size_t> rows;
  for (const auto& shape : session.shapes)
    if (shape.second == 1) rows.push_back(shape.first);
  CHECK(rows == std::vector<std::size_t>{8, 8, 7, 6, 5, 4, 3, 2, 1});
  CHECK(requests[0].stop_reason == chai::StopReason::kLength);
  CHECK(requests[1].stop_reason == chai::StopReason::kCapacity);
}

TEST_CASE("short prompts are fed again until the probe is whole") {
  FakeSession session;
  run(session, {{7, 8}}, {6, 1000, {}});
  const std::vector<FakeSession::Shape> wanted{{1, 2}, {1, 3}, {1, 4}, {1, 5}, {1, 1}, {1, 1}};
  CHECK(session.shapes == wanted);
}

TEST_CASE("chunks are shorter where whole score matrices are made") {
  FakeSession session;
  session.bounded = false;
  run(session, {Ids(2000, 3)}, {2, 4000, {}});
  CHECK(session.shapes[0].second == 512);
  run(session, {Ids(12, 3)}, {2, 4000, {}}, 1, {}, std::int64_t{1} << 20);
  CHECK(session.shapes[0].second == 5);  // the first chunk holds the probe
}

TEST_CASE("memory that goes while rows wait is an error, and rows that run go on") {
  FakeSession session;
  session.memory_pages = 5;  // of the 9 that the pool has
  const auto requests = run(session, {{1}, {2}, {3}}, {9, 1000, {}});
  for (const auto& request : requests) CHECK(text(request) == counted({request.ids[0]}, 9));
  CHECK(session.pool.pages() == 9);
  CHECK(session.pool.touched() == 3);
  session.memory_pages = 2;
  CHECK_THROWS_WITH_AS(run(session, {{1}}, {9, 1000, {}}),
                       "a row of 9 tokens has no memory left for its KV cache; lower max_seq, give shorter "
                       "prompts, or mend it",
                       std::runtime_error);
}

}  // namespace
