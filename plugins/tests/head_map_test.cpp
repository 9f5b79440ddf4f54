// The head map: integers, ties to the lower index, whole KV heads kept.
#include "chai/head_map.h"

#include <limits>

#include "expect.h"

namespace {

std::vector<std::int32_t> map_of(const std::vector<std::int32_t>& points, std::int64_t kv_heads,
                                 std::int64_t kept) {
  std::vector<std::int32_t> map(points.size());
  chai::cluster_heads(points.data(), 1, static_cast<std::int64_t>(points.size()), kv_heads, kept,
                      map.data());
  return map;
}

using Map = std::vector<std::int32_t>;

}  // namespace

int main() {
  const float probabilities[] = {0.5f / 1024, 1.5f / 1024, 2.5f / 1024, 1.0f,
                                 std::numeric_limits<float>::quiet_NaN()};
  std::int32_t quantised[5];
  chai::quantise(probabilities, 5, quantised);
  EXPECT((Map(quantised, quantised + 5) == Map{0, 2, 2, 1024, 0}), "half to even; not a number is 0");

  EXPECT((map_of({0, 10, 1, 11}, 4, 4) == Map{0, 1, 2, 3}), "R = G is the identity");
  EXPECT((map_of({0, 10, 1, 11}, 4, 2) == Map{0, 1, 0, 1}),
         "two clusters; a pair's tie goes to the lower index");
  EXPECT((map_of({5, 5, 5}, 3, 2) == Map{0, 1, 0}), "equal heads: the lower indices are kept");
  EXPECT((map_of({0, 8, 15, 9}, 4, 1) == Map{1, 1, 1, 1}), "the medoid is kept");
  // Chosen once: the middle and one end. Chosen again, the middle moves to where it serves more heads.
  EXPECT((map_of({0, 2, 5, 8, 10}, 5, 2) == Map{0, 0, 3, 3, 3}), "every choice is made once more");
  // Two query heads per KV head; either KV head costs 2, so the lower one is kept, whole.
  EXPECT((map_of({0, 10, 9, 1}, 2, 1) == Map{0, 1, 1, 0}), "whole KV heads, nearest of their query heads");

  const std::int32_t map[] = {2, 3, 2, 3, 6, 6, 6, 7};
  const chai::Slots slots = chai::assign_slots(map, 8, 4);
  EXPECT(slots.used == 2 && (slots.of_kv_head == Map{-1, 0, -1, 1}),
         "kept KV heads take slots in ascending order");
  return 0;
}
