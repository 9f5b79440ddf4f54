// Parts of a softmax row merge to the row, in any order, with empty parts anywhere.
#include "chai/softmax_state.h"

#include <vector>

#include "expect.h"

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

bool near(float a, float b) {
  return std::fabs(a - b) <= 1e-6f * std::fabs(b);
}

}  // namespace

int main() {
  const chai::SoftmaxState row = state_of({1.0f, -3.0f, 7.0f, 2.0f});
  EXPECT(row.max == 7.0f, "the largest score");
  EXPECT(near(row.sum, exp2f(-6.0f) + exp2f(-10.0f) + 1.0f + exp2f(-5.0f)), "the sum of powers");

  chai::SoftmaxState merged;
  EXPECT(merged.empty() && merged.inverse_sum() == 0.0f, "nothing seen");
  const chai::SoftmaxState first = state_of({7.0f, 2.0f});
  const chai::SoftmaxState second = state_of({1.0f, -3.0f});
  merged.merge(chai::SoftmaxState{});
  merged.merge(second);
  merged.merge(first);
  merged.merge(chai::SoftmaxState{});
  EXPECT(merged.max == row.max && near(merged.sum, row.sum), "merged in another order");
  EXPECT(near(merged.weight_of(first) * first.sum + merged.weight_of(second) * second.sum, 1.0f),
         "weights of the parts make one whole");
  EXPECT(merged.weight_of(chai::SoftmaxState{}) == 0.0f, "an empty part weighs nothing");
  return 0;
}
