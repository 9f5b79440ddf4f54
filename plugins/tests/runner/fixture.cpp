#define DOCTEST_CONFIG_IMPLEMENT
#include "tests/runner/fixture.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>

namespace chai::test {
namespace {

constexpr int kSkipped = 77;
std::optional<Fixture> loaded;

}  // namespace

const Fixture& fixture() {
  return loaded.value();
}

}  // namespace chai::test

int main(int argc, char** argv) {
  using namespace chai::test;
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FIXTURE_DIRECTORY [OP_LIBRARY]\n", argv[0]);
    return 2;
  }
  const std::string directory = argv[1];
  std::ifstream stream(directory + "/cases.json");
  if (!stream.is_open()) {
    std::puts("skipped: fixture.py made no bundles");
    return kSkipped;
  }
  std::ostringstream text;
  text << stream.rdbuf();
  loaded.emplace(Fixture{directory, chai::Json::parse(text.str()), {""}});
  const char* named = std::getenv("CHAI_TEST_LIBRARY");
  const std::string library = named != nullptr ? named : argc > 2 ? argv[2] : "";
  if (!library.empty() && std::filesystem::exists(library)) loaded->op_libraries.push_back(library);
  std::printf("%zu implementations of the op\n", loaded->op_libraries.size());
  return doctest::Context().run();
}
