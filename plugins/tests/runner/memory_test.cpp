// What caches may take, and memory that takes none before it is written.
#include "runner/memory.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

constexpr std::int64_t kGiB = std::int64_t{1} << 30;

std::int64_t resident() {
  std::ifstream statm("/proc/self/statm");
  std::int64_t all = 0, pages = 0;
  statm >> all >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

TEST_CASE("sizes have binary units") {
  CHECK(chai::bytes_text(0) == "0 B");
  CHECK(chai::bytes_text(1000) == "1000 B");
  CHECK(chai::bytes_text(1536) == "1.5 KiB");
  CHECK(chai::bytes_text(3 << 20) == "3.0 MiB");
  CHECK(chai::bytes_text(kGiB) == "1.0 GiB");
  CHECK(chai::bytes_text(5000 * kGiB) == "4.9 TiB");
}

TEST_CASE("caches take what they are given, within what is free") {
  const chai::Budget given = chai::budget_of(500, 1000);
  CHECK(given.size == 500);
  CHECK(given.fix == "raise cache_memory (500 B)");
  CHECK(chai::budget_of(900, 1000).size == 900);
  for (const std::int64_t limit : {901, 0}) {
    const chai::Budget free = chai::budget_of(limit, 1000);
    CHECK(free.size == 900);
    CHECK(free.fix == "free memory (1000 B are free)");
  }
  CHECK(chai::available_memory() > 1 << 20);
}

TEST_CASE("addresses take no memory before they are written") {
  const std::int64_t before = resident();
  chai::ReservedMemory memory(static_cast<std::size_t>(4 * kGiB));
  REQUIRE(memory.data() != nullptr);
  memory.data()[3 * kGiB] = 7;
  chai::ReservedMemory moved = std::move(memory);
  CHECK(moved.data()[3 * kGiB] == 7);
  CHECK(moved.bytes() == static_cast<std::size_t>(4 * kGiB));
  CHECK(memory.data() == nullptr);
  CHECK(resident() - before < kGiB / 4);
  CHECK(chai::ReservedMemory(0).data() == nullptr);
}

TEST_CASE("the beginning of a pool takes no large page") {
  const std::int64_t before = resident();
  std::vector<chai::ReservedMemory> pools;
  for (int i = 0; i < 60; ++i) {
    pools.emplace_back(std::size_t{1} << 28);
    pools.back().data()[100] = 1;
  }
  CHECK(resident() - before < 16 << 20);
}

TEST_CASE("more addresses than there are is an error that names the options") {
  const std::size_t all = std::numeric_limits<std::size_t>::max() / 2;
  CHECK_THROWS_WITH_AS(chai::ReservedMemory{all},
                       doctest::Contains("lower cache_memory, max_seq or max_new_tokens"),
                       std::runtime_error);
}

}  // namespace
