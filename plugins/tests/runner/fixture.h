// Bundles made by fixture.py: the directory is the program's first argument, the native op's libraries of
// version 1 and 2 the second and third, or CHAI_TEST_LIBRARY and CHAI_TEST_LIBRARY_V2 in the environment. The
// program ends with 77, "skipped", where there are none.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "support/json.h"

namespace chai::test {

struct Fixture {
  std::string directory;
  Json content;  // cases.json
  // By version of the op: "" for the function body, then the library if there is one.
  std::map<int, std::vector<std::string>> op_libraries;
  std::string onnxruntime_library() const { return content.at("onnxruntime_library").string(); }
};

const Fixture& fixture();

}  // namespace chai::test
