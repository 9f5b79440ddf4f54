// The running state of one softmax row, and how two partial results of a row become one.
//
// Scores are in units of log2: exp(x) = exp2(x * log2(e)), and the factor is folded into the query.
#pragma once

#include <cfloat>
#include <cmath>

#include "chai/inline.h"

namespace chai {

constexpr float kLog2E = 1.4426950408889634f;

struct SoftmaxState {
  float max = -FLT_MAX;  // largest score seen
  float sum = 0.0f;      // sum of exp2(score - max)

  CHAI_INLINE bool empty() const { return sum == 0.0f; }

  // Include another part of the same row.
  CHAI_INLINE void merge(const SoftmaxState& part) {
    const float merged = part.max > max ? part.max : max;
    sum = sum * exp2f(max - merged) + part.sum * exp2f(part.max - merged);
    max = merged;
  }

  // Include a logit that has no value: it takes its share of the sum and gives nothing. -inf is none.
  CHAI_INLINE void include(float sink) {
    if (sink > -HUGE_VALF) merge(SoftmaxState{sink, 1.0f});
  }

  // What the unnormalised output of `part` counts in this state, after all parts were merged and with the
  // division by the sum included. The empty state (a row that sees no key) weighs nothing.
  CHAI_INLINE float weight_of(const SoftmaxState& part) const {
    return part.empty() ? 0.0f : exp2f(part.max - max) / sum;
  }

  // What the unnormalised output counts when this is the whole row but for a sink.
  CHAI_INLINE float weight_beside(float sink) const {
    SoftmaxState whole = *this;
    whole.include(sink);
    return whole.weight_of(*this);
  }
};

}  // namespace chai
