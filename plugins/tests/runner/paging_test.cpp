// Pages and calls. tests/data/paging_cases.json holds these and Python's to the same.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "runner/calls.h"
#include "runner/pages.h"
#include "tests/data.h"

namespace {

using chai::Json;
using chai::PagePool;
using Ids = std::vector<std::int64_t>;

const Json& table() {
  static const Json json = chai::test::read_data("paging_cases.json");
  return json;
}

Ids integers(const Json& json) {
  Ids ids;
  for (const Json& item : json.array()) ids.push_back(item.integer());
  return ids;
}

TEST_CASE("rows are divided into the calls of the table") {
  const std::vector<Json> cases = table().at("calls").array();
  CHECK(cases.size() > 5);
  for (const Json& test_case : cases) {
    CAPTURE(test_case.text());
    std::vector<Ids> calls;
    for (const auto& call : chai::plan_calls(integers(test_case.at("lengths"))))
      calls.emplace_back(call.begin(), call.end());
    std::vector<Ids> wanted;
    for (const Json& call : test_case.at("calls").array()) wanted.push_back(integers(call));
    CHECK(calls == wanted);
  }
}

void take(PagePool& pool, const Json& step) {
  const std::string what = step.at("do").string();
  const std::int64_t row = step.at("row").integer();
  const std::int64_t tokens = step.find("tokens") ? step.at("tokens").integer() : 0;
  if (what == "promise") {
    CHECK(pool.promise(row, tokens) == (step.at("made").text() == "true"));
  } else if (what == "extend") {
    pool.extend(row, tokens);
  } else if (what == "share") {
    CHECK(pool.share(row, step.at("source").integer(), tokens) == step.at("shared").integer());
  } else {
    REQUIRE(what == "release");
    pool.release(row);
  }
  if (const auto pages = step.find("pages")) {
    const auto& held = pool.pages_of(row);
    CHECK(Ids(held.begin(), held.end()) == integers(*pages));
  }
}

TEST_CASE("pools do what the table says") {
  const std::vector<Json> cases = table().at("pools").array();
  CHECK(cases.size() > 2);
  for (const Json& test_case : cases) {
    CAPTURE(test_case.at("name").string());
    PagePool pool(test_case.at("pages").integer(), test_case.at("page_length").integer());
    for (const Json& step : test_case.at("steps").array()) {
      CAPTURE(step.text());
      take(pool, step);
    }
    CHECK(pool.held() == test_case.at("held").integer());
    CHECK(pool.outstanding() == test_case.at("outstanding").integer());
    CHECK(pool.touched() == test_case.at("touched").integer());
    CHECK(pool.peak() == test_case.at("peak").integer());
  }
}

TEST_CASE("tables name pages in the order of positions") {
  PagePool pool(6, 4);
  for (const auto& [row, tokens] : {std::pair{7, 4}, {2, 12}}) {
    REQUIRE(pool.promise(row, tokens));
    pool.extend(row, tokens);
  }
  CHECK(pool.most_pages({2, 7}) == 3);
  CHECK(pool.table({2, 7}) == std::vector<std::int32_t>{1, 2, 3, 0, -1, -1});
  REQUIRE(pool.promise(5, 1));
  CHECK(pool.table({5}) == std::vector<std::int32_t>{-1});
}

TEST_CASE("memory that was touched is taken first") {
  PagePool pool(10, 4);
  REQUIRE(pool.promise(0, 12));
  CHECK(pool.untouched_after(1, 8) == 5);
  pool.extend(0, 12);
  pool.release(0);
  CHECK(pool.untouched_after(1, 8) == 0);
  CHECK(pool.untouched_after(1, 20) == 2);
  REQUIRE(pool.promise(1, 8));
  CHECK(pool.untouched_after(2, 8) == 1);
}

TEST_CASE("what a caller may not do") {
  PagePool pool(4, 8);
  REQUIRE(pool.promise(0, 16));
  CHECK_THROWS_AS(pool.extend(0, 17), std::logic_error);
  CHECK_THROWS_AS(pool.extend(1, 1), std::logic_error);
  CHECK_THROWS_AS(pool.share(0, 0, 8), std::logic_error);
}

// Rows that come, grow and go in any order.
TEST_CASE("no page is in two rows or lost, and promises can be kept") {
  std::mt19937 random(3);
  const auto number = [&](std::int64_t least, std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(least, most)(random);
  };
  for (int run = 0; run < 100; ++run) {
    const std::int64_t length = number(1, 5);
    PagePool pool(number(1, 12), length);
    std::map<std::int64_t, std::int64_t> promised;
    std::size_t most_held = 0;
    for (int step = 0; step < 60; ++step) {
      const std::int64_t row = number(0, 4);
      const std::int64_t tokens = number(1, 40);
      if (promised.count(row) == 0 || number(0, 3) == 0) {
        const std::int64_t wanted = std::max(pool.count(tokens), promised[row]);
        std::int64_t others = 0;
        for (const auto& [other, pages] : promised) others += other == row ? 0 : pages;
        CHECK(pool.promise(row, tokens) == (others + wanted <= pool.pages()));
        if (others + wanted <= pool.pages()) promised[row] = wanted;
        if (promised[row] == 0) promised.erase(row);
      } else if (number(0, 3) == 0) {
        pool.release(row);
        promised.erase(row);
      } else {
        pool.extend(row, number(0, promised[row] * length));
      }
      std::set<std::int32_t> held;
      std::size_t count = 0;
      for (const auto& [other, _] : promised) {
        const auto& pages = pool.pages_of(other);
        held.insert(pages.begin(), pages.end());
        count += pages.size();
      }
      most_held = std::max(most_held, count);
      REQUIRE(held.size() == count);
      REQUIRE(pool.held() == static_cast<std::int64_t>(count));
      REQUIRE(pool.held() + pool.outstanding() <= pool.pages());
      REQUIRE(pool.touched() == static_cast<std::int64_t>(most_held));
      REQUIRE(pool.peak() == pool.touched());
    }
  }
}

}  // namespace
