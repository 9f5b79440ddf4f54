// Assertions of the native tests: the first failure says where and ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#define EXPECT(condition, message)                                              \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: %s\n  %s\n", __FILE__, __LINE__, #condition, \
                   std::string(message).c_str());                               \
      std::exit(1);                                                             \
    }                                                                           \
  } while (false)
