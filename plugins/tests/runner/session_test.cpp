// The ONNX Runtime session, below the runner.
#include "runner/backends/onnxruntime/session.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/runner/fixture.h"

namespace {

using Ids = std::vector<std::int64_t>;
using Settings = chai::OnnxRuntimeSession::Settings;

Ids prompt(std::size_t length, std::int64_t first) {
  Ids ids;
  for (std::size_t i = 0; i < length; ++i) ids.push_back((first + static_cast<std::int64_t>(i * i)) % 36 + 4);
  return ids;
}

// A bundle and an implementation of the op.
struct Subject {
  std::string bundle;
  std::string op_library;

  chai::OnnxRuntimeSession open(std::int64_t page_length, chai::Heads heads = chai::Heads::kChai,
                                Settings settings = {}) const {
    const std::string& library = chai::test::fixture().onnxruntime_library();
    chai::Options options;
    options.threads = 1;
    options.heads = heads;
    settings.page_length = page_length;
    return {chai::onnxruntime_environment(library),
            bundle,
            chai::read_manifest(bundle),
            options,
            op_library,
            settings};
  }
};

void for_each_subject(const std::function<void(const Subject&)>& check) {
  const chai::test::Fixture& fixture = chai::test::fixture();
  for (const char* name : {"/mha", "/8-4", "/mixed"}) {
    for (const std::string& op_library : fixture.op_libraries) {
      CAPTURE(name);
      CAPTURE(op_library);
      check({fixture.directory + name, op_library});
    }
  }
}

// Feeds tokens of some rows, each from `past` on; their logits after the last one.
std::vector<float> feed(chai::Session& session, const std::vector<std::int64_t>& rows,
                        const std::vector<Ids>& ids, const std::vector<std::int32_t>& past) {
  std::size_t tokens = 0;
  for (const Ids& row : ids) tokens = std::max(tokens, row.size());
  chai::Step step;
  step.past_lengths = past;
  for (Ids row : ids) {
    step.lengths.push_back(static_cast<std::int32_t>(row.size()));
    step.output_positions.push_back(static_cast<std::int64_t>(row.size()) - 1);
    row.resize(tokens, 0);
    step.input_ids.insert(step.input_ids.end(), row.begin(), row.end());
  }
  return session.step(step, rows);
}

// The same of a text that is fed at once, with nothing else there. What the session held is gone.
std::vector<float> alone(chai::Session& session, const Ids& ids) {
  const auto tokens = static_cast<std::int64_t>(ids.size());
  session.start(1, tokens);
  REQUIRE(session.promise(0, tokens));
  return feed(session, {0}, {ids}, {0});
}

void check_close(const float* found, const std::vector<float>& wanted) {
  for (std::size_t i = 0; i < wanted.size(); ++i)
    CHECK(found[i] == doctest::Approx(wanted[i]).epsilon(1e-4).scale(1));
}

TEST_CASE("pages are as long as the Python runner's") {
  CHECK(chai::test::fixture().content.at("page_length").integer() == chai::kPageLength);
}

TEST_CASE("rows, pages and chunks make no difference") {
  for_each_subject([](const Subject& subject) {
    const Ids first = prompt(40, 3), second = prompt(23, 11);
    const Ids begun(first.begin(), first.begin() + 17), rest(first.begin() + 17, first.end());
    for (const chai::Heads heads : {chai::Heads::kChai, chai::Heads::kAll}) {
      std::vector<float> wanted_first, wanted_second;
      // Opening a session takes longer than all that is done with it.
      for (const std::int64_t page_length : heads == chai::Heads::kAll ? Ids{64, 5} : Ids{64, 5, 1}) {
        CAPTURE(page_length);
        auto session = subject.open(page_length, heads);
        if (wanted_first.empty()) {
          wanted_first = alone(session, first);
          wanted_second = alone(session, second);
        }
        session.start(3, 100);
        REQUIRE(session.promise(2, 40));
        feed(session, {2}, {begun}, {0});
        REQUIRE(session.promise(0, 23));
        // Two rows of unlike lengths and phases, in the order of the call and not of the batch.
        const std::vector<float> logits = feed(session, {2, 0}, {rest, second}, {17, 0});
        REQUIRE(logits.size() == wanted_first.size() * 2);
        check_close(logits.data(), wanted_first);
        check_close(logits.data() + wanted_first.size(), wanted_second);
        CHECK(session.pool().held() ==
              (40 + page_length - 1) / page_length + (23 + page_length - 1) / page_length);
        // The pages that a row gives back are another one's.
        session.release(2);
        REQUIRE(session.promise(1, 40));
        const std::vector<float> again = feed(session, {1}, {first}, {0});
        check_close(again.data(), wanted_first);
      }
    }
  });
}

TEST_CASE("a row grows without a copy of its pages where the op appends in place") {
  for_each_subject([](const Subject& subject) {
    const Ids ids = prompt(100, 5);
    auto session = subject.open(4);
    session.start(1, 25);
    REQUIRE(session.promise(0, 100));
    std::vector<float> logits = feed(session, {0}, {Ids(ids.begin(), ids.begin() + 8)}, {0});
    const char* before = session.buffers()[0].data();
    const std::size_t page = session.buffers()[0].bytes() / (session.in_place() ? 25 : 2);
    const std::vector<char> content(before, before + page);
    for (std::int64_t i = 8; i < 100; ++i)
      logits = feed(session, {0}, {{ids[static_cast<std::size_t>(i)]}}, {static_cast<std::int32_t>(i)});
    CHECK(std::memcmp(session.buffers()[0].data(), content.data(), page) == 0);
    if (session.in_place()) CHECK(session.buffers()[0].data() == before);
    CHECK(session.pool().touched() == 25);
    std::int64_t bytes = 0;
    for (const auto& buffer : session.buffers()) bytes += static_cast<std::int64_t>(buffer.bytes());
    CHECK(bytes == 25 * session.page_bytes());
    check_close(logits.data(), alone(session, ids));
  });
}

TEST_CASE("memory is looked at before pages are promised") {
  for_each_subject([](const Subject& subject) {
    std::int64_t free_pages = 12;
    std::int64_t page = 0;
    Settings settings;
    settings.available_memory = [&] { return free_pages * page; };
    auto session = subject.open(4, chai::Heads::kChai, settings);
    const std::int64_t sets = session.in_place() ? 1 : 2;
    page = sets * session.page_bytes();
    CHECK(session.room().tokens == 10 * 4);  // nine tenths
    session.start(2, 20);
    CHECK(session.promise(0, 8 * 4));
    CHECK(session.capacity() == 32);
    CHECK_FALSE(session.promise(1, 5 * 4));
    CHECK(session.promise(1, 4 * 4));
    session.release(1);
    free_pages = 100;
    CHECK_FALSE(session.promise(1, 13 * 4));  // more than the pool has
    CHECK(session.promise(1, 12 * 4));
    session.drop();
    CHECK(session.pool().pages() == 0);
  });
}

}  // namespace
