// The tables of tests/data, which the Python tests read too.
#pragma once

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "support/json.h"

namespace chai::test {

inline Json read_data(const std::string& name) {
  std::ifstream stream(std::string(CHAI_TEST_DATA) + "/" + name);
  if (!stream.is_open()) throw std::runtime_error("there is no " + name + " in " CHAI_TEST_DATA);
  return Json::parse(std::string{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()});
}

}  // namespace chai::test
