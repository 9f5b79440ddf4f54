#include "runner/calls.h"

#include <algorithm>
#include <numeric>

namespace chai {
namespace {

// What a call costs beyond its tokens, in tokens: reading all weights, where few tokens share it.
constexpr std::int64_t kCallTokens = 16;

}  // namespace

std::vector<std::vector<std::size_t>> plan_calls(const std::vector<std::int64_t>& lengths) {
  std::vector<std::size_t> order(lengths.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return lengths[a] < lengths[b]; });
  // least[n] is the cost of the n shortest rows, the last of whose calls begins at first[n].
  std::vector<std::int64_t> least{0};
  std::vector<std::size_t> first{0};
  for (std::size_t count = 1; count <= order.size(); ++count) {
    const std::int64_t longest = lengths[order[count - 1]];
    const auto cost = [&](std::size_t start) {
      return least[start] + static_cast<std::int64_t>(count - start) * longest + kCallTokens;
    };
    std::size_t best = 0;  // of equals the first, whose last call has the most rows
    for (std::size_t start = 1; start < count; ++start)
      if (cost(start) < cost(best)) best = start;
    least.push_back(cost(best));
    first.push_back(best);
  }
  std::vector<std::vector<std::size_t>> calls;
  for (std::size_t end = order.size(); end > 0; end = first[end]) {
    calls.emplace_back(order.begin() + static_cast<std::ptrdiff_t>(first[end]),
                       order.begin() + static_cast<std::ptrdiff_t>(end));
    std::sort(calls.back().begin(), calls.back().end());
  }
  std::reverse(calls.begin(), calls.end());
  return calls;
}

}  // namespace chai
