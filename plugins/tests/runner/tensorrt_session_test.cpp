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
  CHECK(geometry.head_dim == 8);
  CHECK(geometry.value_head_dim == 4);
  CHECK(geometry.vocab_size == 50);
  CHECK(geometry.kept_heads == std::vector<std::int64_t>{1, 1});
  CHECK(geometry.num_caches() == 2);
  CHECK(session.max_tokens() == 16);
  CHECK(session.max_capacity() == 64);
  CHECK(session.max_batch() == 3);
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

TEST_CASE("a text is prefilled, decoded, captured and replayed") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  for (int again = 0; again < 2; ++again) {
    const int steps = played().steps;
    session.begin(1, 32);
    std::int64_t token = most_likely(session.step({{7, 9, 20}, {3}, {0}, {2}}));
    CHECK(token == 21);
    for (std::int32_t past = 3; past < 9; ++past)
      token = most_likely(session.step({{token}, {1}, {past}, {0}}));
    CHECK(token == 27);
    CHECK(played().steps - steps == 7);
    // Every step read the map that the one before it wrote.
    CHECK(session.head_map() == std::vector<std::int32_t>(2 * 1 * 4, 7));
    // The first single step prepares TensorRT for its shapes, the second is captured; another text has its
    // own.
    CHECK(played().captured_steps == again + 1);
    CHECK(played().replays == 5 * (again + 1));
  }
  CHECK(played().captures == std::vector<cudaStreamCaptureMode>(2, cudaStreamCaptureModeThreadLocal));
}

TEST_CASE("past and present caches are bound to one address, and the head map to two") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so", chai::Heads::kAll);
  session.begin(2, 32);
  session.step({{7, 9, 20, 0}, {2, 1}, {0, 0}, {1, 0}});
  const auto& addresses = played().contexts[0]->addresses;
  const auto& shapes = played().contexts[0]->shapes;
  for (const char* name : {"key.0", "value.0", "key.1", "value.1"}) {
    CAPTURE(name);
    CHECK(addresses.at(std::string("past_") + name) == addresses.at(std::string("present_") + name));
    CHECK(shapes.at(std::string("past_") + name).d[1] == 2);
    CHECK(shapes.at(std::string("past_") + name).d[2] == 32);
  }
  CHECK(addresses.at("head_map") != addresses.at("present_head_map"));
}

TEST_CASE("a step that fails while it is captured ends the capture, and the session goes on") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  session.begin(1, 32);
  session.step({{7}, {1}, {0}, {0}});
  played().no_step = true;
  CHECK_THROWS_AS(session.step({{8}, {1}, {1}, {0}}), std::runtime_error);
  CHECK(played().graphs == 0);
  played().no_step = false;
  CHECK(most_likely(session.step({{8}, {1}, {1}, {0}})) == 9);
}

TEST_CASE("steps that do not fit are refused") {
  const Stage stage;
  TensorRtSession session(stage.plan(), "plugin.so");
  CHECK_THROWS_WITH_AS(session.step({{7}, {1}, {0}, {0}}), "call begin first", std::runtime_error);
  CHECK_THROWS_AS(session.begin(4, 32), std::runtime_error);
  CHECK_THROWS_AS(session.begin(1, 65), std::runtime_error);
  session.begin(1, 4);
  CHECK_THROWS_AS(session.step({{7, 8}, {1, 1}, {0}, {0}}), std::runtime_error);
  CHECK_THROWS_AS(session.step({{7}, {1}, {4}, {0}}), std::runtime_error);
  CHECK_THROWS_AS(session.step({{7}, {2}, {0}, {0}}), std::runtime_error);
  CHECK_THROWS_AS(session.grow(8), std::logic_error);
  CHECK(played().steps == 0);
}

}  // namespace
