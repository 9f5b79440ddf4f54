// Parts of a softmax row merge to the row, in any order, with empty parts anywhere.
#include "chai/softmax_state.h"

#include <doctest/doctest.h>

#include <vector>

namespace {

chai::SoftmaxState state_of(const std::vector<float>& scores) {
  chai::SoftmaxState state;
  for (float score : scores) {
    chai::SoftmaxState one;
    one.max = score;
    one.sum = 1.0f;
    state.merge(one);
  }
  return state;
}

doctest::Approx about(float value) {
  return doctest::Approx(value).epsilon(1e-6);
}

TEST_CASE("parts of a softmax row merge to the row in any order") {
  const chai::SoftmaxState row = state_of({1.0f, -3.0f, 7.0f, 2.0f});
  CHECK(row.max == 7.0f);
  CHECK(row.sum == about(exp2f(-6.0f) + exp2f(-10.0f) + 1.0f + exp2f(-5.0f)));

  chai::SoftmaxState merged;
  CHECK(merged.empty());
  CHECK(merged.weight_beside(-HUGE_VALF) == 0.0f);
  const chai::SoftmaxState first = state_of({7.0f, 2.0f});
  const chai::SoftmaxState second = state_of({1.0f, -3.0f});
  for (const chai::SoftmaxState& part : {chai::SoftmaxState{}, second, first, chai::SoftmaxState{}})
    merged.merge(part);
  CHECK(merged.max == row.max);
  CHECK(merged.sum == about(row.sum));
  CHECK(merged.weight_of(first) * first.sum + merged.weight_of(second) * second.sum == about(1.0f));
  CHECK(merged.weight_of(chai::SoftmaxState{}) == 0.0f);
}

}  // namespace
