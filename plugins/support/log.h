// Messages of the native libraries where no framework's logger takes them.
#pragma once

#include <cstdio>

namespace chai {

// One line on stderr: "who: message", or the message alone when `who` is empty.
inline void log_to_stderr(const char* who, const char* message) noexcept {
  std::fprintf(stderr, "%s%s%s\n", who, *who == '\0' ? "" : ": ", message);
}

}  // namespace chai
