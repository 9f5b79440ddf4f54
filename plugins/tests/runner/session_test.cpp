// The ONNX Runtime session of version 1 of the op, below the runner.
#include "runner/backends/onnxruntime/session.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "tests/runner/fixture.h"

namespace {

constexpr std::int64_t kGrown = 24;

// One row of seven tokens and three more, with the caches enlarged after `grow_after` of its four steps.
std::vector<float> last_logits(chai::OnnxRuntimeSession& session, int grow_after) {
  session.begin(1, grow_after == 0 ? kGrown : 10);
  std::vector<float> logits = session.step({{4, 9, 7, 30, 12, 8, 3}, {7}, {0}, {6}});
  for (int step = 1; step < 4; ++step) {
    if (grow_after == step) session.grow(kGrown);
    logits = session.step({{20 + step}, {1}, {6 + step}, {0}});
  }
  CHECK(session.capacity() == (grow_after < 4 ? kGrown : 10));
  return logits;
}

// Whichever of the two sets of buffers and head maps holds it.
TEST_CASE("caches that grow keep what they hold") {
  const chai::test::Fixture& fixture = chai::test::fixture();
  Ort::Env& environment = chai::onnxruntime_environment(fixture.onnxruntime_library());
  for (const char* name : {"/mha", "/gqa"}) {
    const std::string bundle = fixture.directory + name;
    const chai::Manifest manifest = chai::read_manifest(bundle);
    for (const std::string& op_library : fixture.op_libraries.at(1)) {
      for (const chai::Heads heads : {chai::Heads::kChai, chai::Heads::kAll}) {
        chai::Options options;
        options.threads = 1;
        options.heads = heads;
        chai::OnnxRuntimeSession session(environment, bundle, manifest, options, op_library);
        const std::vector<float> wanted = last_logits(session, 0);
        for (const int grow_after : {1, 2, 3, 4}) {
          CAPTURE(bundle);
          CAPTURE(op_library);
          CAPTURE(grow_after);
          const std::vector<float> logits = last_logits(session, grow_after);
          REQUIRE(logits.size() == wanted.size());
          for (std::size_t i = 0; i < wanted.size(); ++i)
            CHECK(logits[i] == doctest::Approx(wanted[i]).epsilon(1e-4));
        }
      }
    }
  }
}

}  // namespace
