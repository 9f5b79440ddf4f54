// Reporting what a caller can mend.
#pragma once

#include <stdexcept>
#include <string>

namespace chai {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

}  // namespace chai
