// The head map: integers, ties to the lower index, whole KV heads kept.
#include "chai/head_map.h"

#include <doctest/doctest.h>

#include <limits>

namespace {

using Map = std::vector<std::int32_t>;

Map map_of(const Map& points, std::int64_t kv_heads, std::int64_t kept) {
  Map map(points.size());
  chai::cluster_heads(points.data(), 1, static_cast<std::int64_t>(points.size()), kv_heads, kept, map.data());
  return map;
}

TEST_CASE("probabilities are quantised half to even, and not a number is 0") {
  const float probabilities[] = {0.5f / 1024, 1.5f / 1024, 2.5f / 1024, 1.0f,
                                 std::numeric_limits<float>::quiet_NaN()};
  std::int32_t quantised[5];
  chai::quantise(probabilities, 5, quantised);
  CHECK(Map(quantised, quantised + 5) == Map{0, 2, 2, 1024, 0});
}

TEST_CASE("heads map to the nearest kept head") {
  // R = G is the identity.
  CHECK(map_of({0, 10, 1, 11}, 4, 4) == Map{0, 1, 2, 3});
  // Two clusters; a pair's tie goes to the lower index.
  CHECK(map_of({0, 10, 1, 11}, 4, 2) == Map{0, 1, 0, 1});
  // Equal heads: the lower indices are kept.
  CHECK(map_of({5, 5, 5}, 3, 2) == Map{0, 1, 0});
  // The medoid is kept.
  CHECK(map_of({0, 8, 15, 9}, 4, 1) == Map{1, 1, 1, 1});
  // Chosen once: the middle and one end. Chosen again, the middle moves to where it serves more heads.
  CHECK(map_of({0, 2, 5, 8, 10}, 5, 2) == Map{0, 0, 3, 3, 3});
  // Two query heads per KV head; either KV head costs 2, so the lower one is kept, whole.
  CHECK(map_of({0, 10, 9, 1}, 2, 1) == Map{0, 1, 1, 0});
}

TEST_CASE("kept KV heads take slots in ascending order") {
  const std::int32_t map[] = {2, 3, 2, 3, 6, 6, 6, 7};
  const chai::Slots slots = chai::assign_slots(map, 8, 4);
  CHECK(slots.used == 2);
  CHECK(slots.of_kv_head == Map{-1, 0, -1, 1});
}

}  // namespace
