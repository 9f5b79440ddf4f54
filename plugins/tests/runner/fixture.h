// Bundles made by fixture.py: the directory is the program's first argument, the native op's library the
// second or CHAI_TEST_LIBRARY in the environment. The program ends with 77, "skipped", where there are none.
#pragma once

#include <string>
#include <vector>

#include "support/json.h"

namespace chai::test {

struct Fixture {
  std::string directory;
  Json content;                           // cases.json
  std::vector<std::string> op_libraries;  // "" for the function body, then the library if there is one
  std::string onnxruntime_library() const { return content.at("onnxruntime_library").string(); }
};

const Fixture& fixture();

}  // namespace chai::test
