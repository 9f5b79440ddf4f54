// The TensorRT session on players of TensorRT and CUDA.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/backends/tensorrt/session.h"
#include "tests/played/played.h"

namespace {

using chai::TensorRtSession;
using chai::test::Played;
using chai::test::played;

// A file that stands for an engine, and players that begin afresh.
class Stage {
 public:
  Stage() {
    chai::test::play_afresh();
    const int descriptor = mkstemp(plan_);
    REQUIRE(descriptor >= 0);
    std::ofstream(plan_) << "a plan";
  }
  ~Stage() {
    std::remove(plan_);
    // Whatever happened, nothing is left.
    CHECK(played().streams == 0);
    CHECK(played().allocations == 0);
    CHECK(played().graphs == 0);
    CHECK(played().objects == 0);
  }
  const char* plan() const { return plan_; }

 private:
  char plan_[25] = "/tmp/chai-engine-XXXXXX";
};

std::int64_t most_likely(const std::vector<float>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

TEST_CASE("an engine tells its geometry") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  const chai::Geometry& geometry = session.geometry();
  CHECK(geometry.num_layers == 2);
  CHECK(geometry.num_query_heads == 4);
  CHECK(geometry.num_kv_heads == 2);
  CHECK(geometry.vocab_size == 50);
  CHECK(geometry.kept_heads == std::vector<std::int64_t>{1, 1});
  CHECK(geometry.num_caches() == 2);
  CHECK(session.max_tokens() == 16);
  CHECK(session.page_length() == 4);
  CHECK(session.max_capacity() == 32);
  CHECK(session.max_batch() == 5);
}

TEST_CASE("a constructor that throws leaves nothing behind") {
  const std::vector<std::pair<const char*, std::function<void(Played&)>>> faults = {
      {"making a CUDA stream failed", [](Played& p) { p.no_stream = true; }},
      {"plugin.so does not load", [](Played& p) { p.no_library = true; }},
      {"does not load; build it on this GPU", [](Played& p) { p.no_engine = true; }},
      {"allocating GPU memory failed: out of memory", [](Played& p) { p.no_memory = true; }},
      {"could not make an execution context", [](Played& p) { p.contexts_before_fault = 0; }},
      {"could not make an execution context", [](Played& p) { p.contexts_before_fault = 1; }}};
  for (const auto& [message, fault] : faults) {
    CAPTURE(message);
    const Stage stage;
    fault(played());
    CHECK_THROWS_WITH_AS(TensorRtSession(stage.plan(), "plugin.so"), doctest::Contains(message),
                         std::runtime_error);
  }
  const Stage stage;
  CHECK_THROWS_WITH_AS(TensorRtSession("/nowhere/engine.plan", "plugin.so"),
                       "cannot read /nowhere/engine.plan", std::runtime_error);
}

TEST_CASE("a plugin that is registered is not loaded again") {
  const Stage stage;
  {
    TensorRtSession first(stage.plan(), "plugin.so");
    TensorRtSession second(stage.plan(), "plugin.so");
    CHECK(played().loaded_libraries == std::vector<std::string>{"plugin.so"});
  }
  chai::test::play_afresh();
  played().plugin_is_registered = true;  // by the program itself
  TensorRtSession session(stage.plan(), "plugin.so");
  CHECK(played().loaded_libraries.empty());
}

TEST_CASE("both contexts share one scratch buffer, large enough for either profile") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  REQUIRE(played().contexts.size() == 2);
  CHECK(played().allocations == 1);
  for (int i = 0; i < 2; ++i) {
    const nvinfer1::IExecutionContext& context = *played().contexts[static_cast<std::size_t>(i)];
    CHECK(context.strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
    CHECK(context.profile == i);
    CHECK(context.memory != nullptr);
    CHECK(context.memory == played().contexts[0]->memory);
    CHECK(context.memory_size == 3000);
  }
}

// The tokens that follow `prompt`, fed one by one; the text of row 0.
std::vector<std::int64_t> decode(TensorRtSession& session, const std::vector<std::int64_t>& prompt,
                                 int tokens) {
  const auto length = static_cast<std::int32_t>(prompt.size());
  std::vector<std::int64_t> made = {most_likely(session.step({prompt, {length}, {0}, {length - 1}}, {0}))};
  for (std::int32_t past = length; past < length + tokens; ++past)
    made.push_back(most_likely(session.step({{made.back()}, {1}, {past}, {0}}, {0})));
  return made;
}

TEST_CASE("a text is prefilled, decoded, captured and replayed") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  for (int again = 0; again < 2; ++again) {
    const int steps = played().steps;
    const int copies = played().copies;
    session.start(1, 3);
    REQUIRE(session.promise(0, 12));
    CHECK(decode(session, {7, 8, 9, 10, 11}, 3) == std::vector<std::int64_t>{12, 13, 14, 15});
    CHECK(played().steps - steps == 4);
    CHECK(session.head_map() == std::vector<std::int32_t>(2 * 1 * 4, 7));
    // The first single step prepares TensorRT for its shapes, the second is captured; another text has its
    // own.
    CHECK(played().captured_steps == again + 1);
    CHECK(played().replays == 2 * (again + 1));
    // All inputs of a step go in one copy.
    CHECK(played().copies - copies == 4);
  }
  CHECK(played().captures == std::vector<cudaStreamCaptureMode>(2, cudaStreamCaptureModeThreadLocal));
  CHECK(played().contexts.size() == 2);
}

TEST_CASE("a page table is as wide as a power of two, and each width has a graph") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  session.start(1, 6);
  REQUIRE(session.promise(0, 24));
  const std::vector<std::int64_t> made = decode(session, {7, 8, 9}, 20);
  CHECK(made.back() == 30);
  // 3 to 23 tokens: 1, 2, 4 and 8 pages of 4 positions; of each but the first width all steps but the first.
  CHECK(played().captured_steps == 3);
  CHECK(played().replays == 20 - 4);
  REQUIRE(played().contexts.size() == 5);
  for (int i = 1; i < 5; ++i) {
    const auto& shapes = played().contexts[static_cast<std::size_t>(i)]->shapes;
    CHECK(shapes.at("page_table").d[1] == 1 << (i - 1));
  }
}

TEST_CASE("calls have the rows that they name, and rows keep their pages and maps") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  session.start(3, 6);
  for (const std::int64_t row : {0, 1, 2}) REQUIRE(session.promise(row, 8));
  session.step({{7, 8, 9, 30, 31, 0}, {3, 2}, {0, 0}, {2, 1}}, {0, 2});
  session.step({{3, 4}, {2}, {0}, {1}}, {1});
  const std::vector<float> logits = session.step({{32, 5}, {1, 1}, {2, 2}, {0, 0}}, {2, 1});
  CHECK(most_likely({logits.begin(), logits.begin() + 50}) == 33);
  CHECK(most_likely({logits.begin() + 50, logits.end()}) == 6);
  std::vector<std::int32_t> maps;
  for (int layer = 0; layer < 2; ++layer) {
    for (const std::int32_t first : {7, 3, 30}) maps.insert(maps.end(), 4, first);
  }
  CHECK(session.head_map() == maps);
  CHECK(played().calls == std::vector<std::pair<std::int64_t, std::int64_t>>{{2, 3}, {1, 2}, {2, 1}});
  // A row that has ended gives its pages to the next one.
  session.release(2);
  REQUIRE(session.promise(2, 8));
  CHECK(most_likely(session.step({{20, 21}, {2}, {0}, {1}}, {2})) == 22);
  CHECK(session.pool().touched() == 3);
}

TEST_CASE("the graphs that were used last stay, and contexts of others are used again") {
  const Stage stage;
  {
    TensorRtSession session(stage.plan(), "plugin.so");
    session.start(5, 40);
    for (std::int64_t row = 0; row < 5; ++row) REQUIRE(session.promise(row, 32));
    std::int32_t past = 0;
    // Of 1, 2, 4 and 8 pages; 20 shapes in all. The token of row r at position p is p + r.
    for (const std::int32_t until : {2, 6, 14, 30}) {
      for (std::int64_t row = 0; row < 5; ++row) {
        std::vector<std::int64_t> chunk;
        for (std::int32_t place = past; place < until; ++place) chunk.push_back(place + row);
        session.step({chunk, {until - past}, {past}, {until - past - 1}}, {row});
      }
      past = until;
      for (std::size_t count = 1; count <= 5; ++count) {
        chai::Step step;
        std::vector<std::int64_t> rows;
        for (std::size_t row = 0; row < count; ++row) {
          step.input_ids.push_back(past + static_cast<std::int64_t>(row));
          rows.push_back(static_cast<std::int64_t>(row));
        }
        step.lengths.assign(count, 1);
        step.past_lengths.assign(count, past);
        step.output_positions.assign(count, 0);
        for (int again = 0; again < 3; ++again) {
          const std::vector<float> logits = session.step(step, rows);
          for (std::size_t row = 0; row < count; ++row) {
            const auto first = logits.begin() + static_cast<std::ptrdiff_t>(50 * row);
            CHECK(most_likely({first, first + 50}) == past + 1 + static_cast<std::int64_t>(row));
          }
        }
      }
    }
    CHECK(played().captured_steps == 20);
    CHECK(played().graphs == TensorRtSession::kMostGraphs);
    CHECK(played().contexts.size() == 1 + TensorRtSession::kMostGraphs);
  }
}

TEST_CASE("pools are bound to one address as past and present, and the head map to two") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so", chai::Heads::kAll);
  session.start(2, 5);
  REQUIRE(session.promise(0, 4));
  REQUIRE(session.promise(1, 4));
  session.step({{7, 8, 20, 0}, {2, 1}, {0, 0}, {1, 0}}, {0, 1});
  const auto& addresses = played().contexts[0]->addresses;
  const auto& shapes = played().contexts[0]->shapes;
  for (const char* name : {"key.0", "value.0", "key_scales.0", "key.1", "value.1", "key_scales.1"}) {
    CAPTURE(name);
    const nvinfer1::Dims& shape = shapes.at(std::string("past_") + name);
    CHECK(addresses.at(std::string("past_") + name) == addresses.at(std::string("present_") + name));
    CHECK(shape.d[0] == 5);
    CHECK(shape.d[1] == 2);
    CHECK(shape.d[2] == 4);
  }
  CHECK(addresses.at("head_map") != addresses.at("present_head_map"));
  for (const auto& [name, address] : addresses) CHECK(reinterpret_cast<std::uintptr_t>(address) % 2 == 0);
}

TEST_CASE("room is what the GPU has, or what the caller allows") {
  const Stage stage;
  {
    TensorRtSession session(stage.plan(), "plugin.so");
    // Two layers of one key head of 8 codes and 2 scales, two value heads of 4 float16 numbers.
    CHECK(session.page_bytes() == 2 * 4 * (8 + 4 + 16));
    played().free_memory = 2000;
    CHECK(session.room().tokens == 1800 / session.page_bytes() * 4);
    CHECK(session.room().budget.fix == "free GPU memory (2.0 KiB are free)");
  }
  TensorRtSession session(stage.plan(), "plugin.so", chai::Heads::kChai, 500);
  CHECK(session.room().tokens == 8);
  CHECK(session.room().budget.fix == "raise cache_memory (500 B)");
}

TEST_CASE("a step that fails while it is captured ends the capture, and the session goes on") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  session.start(1, 2);
  REQUIRE(session.promise(0, 8));
  session.step({{7}, {1}, {0}, {0}}, {0});
  played().no_step = true;
  CHECK_THROWS_AS(session.step({{8}, {1}, {1}, {0}}, {0}), std::runtime_error);
  CHECK(played().graphs == 0);
  played().no_step = false;
  CHECK(most_likely(session.step({{8}, {1}, {1}, {0}}, {0})) == 9);
}

TEST_CASE("steps that do not fit are refused") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  CHECK_THROWS_WITH_AS(session.step({{7}, {1}, {0}, {0}}, {0}), "call start first", std::runtime_error);
  CHECK_THROWS_WITH_AS(session.start(6, 8), doctest::Contains("build with a higher --max-batch"),
                       std::runtime_error);
  session.start(1, 2);
  CHECK_THROWS_WITH_AS(session.promise(0, 33), doctest::Contains("rows of up to 32 tokens"),
                       std::runtime_error);
  CHECK_FALSE(session.promise(0, 9));
  REQUIRE(session.promise(0, 4));
  CHECK_THROWS_AS(session.step({{7, 8}, {1, 1}, {0}, {0}}, {0}), std::runtime_error);
  CHECK_THROWS_AS(session.step({{7}, {1}, {0}, {0}}, {1}), std::runtime_error);
  CHECK_THROWS_AS(session.step({{7}, {2}, {0}, {0}}, {0}), std::runtime_error);
  CHECK_THROWS_AS(session.step({{7}, {0}, {0}, {0}}, {0}), std::runtime_error);
  CHECK_THROWS_AS(session.step({{7}, {1}, {4}, {0}}, {0}), std::logic_error);
  CHECK(played().steps == 0);
  played().no_memory = true;
  CHECK_THROWS_WITH_AS(session.start(1, 2), doctest::Contains("allocating GPU memory failed"),
                       std::runtime_error);
  played().no_memory = false;
}

}  // namespace
