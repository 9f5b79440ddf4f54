// The ONNX Runtime session below the runner: caches that grow keep what they hold, whichever of the two sets
// of buffers and head maps holds it. Arguments as of runner_bundle_test.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "expect.h"
#include "json.h"
#include "manifest.h"
#include "onnxruntime_session.h"

namespace {

constexpr int kSkipped = 77;
constexpr std::int64_t kGrown = 24;

// One row of seven tokens and three more, with the caches enlarged after `grow_after` of its four steps.
std::vector<float> last_logits(chai::OnnxRuntimeSession& session, int grow_after) {
  session.begin(1, grow_after == 0 ? kGrown : 10);
  std::vector<float> logits = session.step({{4, 9, 7, 30, 12, 8, 3}, {7}, {0}, {6}});
  for (int step = 1; step < 4; ++step) {
    if (grow_after == step) session.grow(kGrown);
    logits = session.step({{20 + step}, {1}, {6 + step}, {0}});
  }
  EXPECT(session.capacity() == (grow_after == 0 || grow_after < 4 ? kGrown : 10), "capacity");
  return logits;
}

void growth_keeps_what_the_caches_hold(const std::string& bundle, chai::Options options,
                                       const std::string& op_library) {
  const chai::Manifest manifest = chai::read_manifest(bundle);
  Ort::Env& environment = chai::onnxruntime_environment(options.onnxruntime_library);
  for (const chai::Heads heads : {chai::Heads::kChai, chai::Heads::kAll}) {
    options.heads = heads;
    chai::OnnxRuntimeSession session(environment, bundle, manifest, options, op_library);
    const std::vector<float> wanted = last_logits(session, 0);
    for (const int grow_after : {1, 2, 3, 4}) {
      const std::vector<float> logits = last_logits(session, grow_after);
      for (std::size_t i = 0; i < wanted.size(); ++i)
        EXPECT(std::abs(logits[i] - wanted[i]) < 1e-4f, "grown after step " + std::to_string(grow_after));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  EXPECT(argc >= 2, "usage: runner_session_test FIXTURE_DIRECTORY [OP_LIBRARY]");
  const std::string directory = argv[1];
  std::ifstream stream(directory + "/cases.json");
  if (!stream.is_open()) {
    std::puts("skipped: runner_fixture.py made no bundles");
    return kSkipped;
  }
  std::ostringstream text;
  text << stream.rdbuf();
  chai::Options options;
  options.threads = 1;
  options.onnxruntime_library = chai::Json::parse(text.str()).at("onnxruntime_library").string();
  const char* named = std::getenv("CHAI_TEST_LIBRARY");
  const std::string library = named != nullptr ? named : argc > 2 ? argv[2] : "";
  for (const char* bundle : {"/mha", "/gqa"}) {
    growth_keeps_what_the_caches_hold(directory + bundle, options, "");
    if (std::filesystem::exists(library))
      growth_keeps_what_the_caches_hold(directory + bundle, options, library);
  }
  return 0;
}
