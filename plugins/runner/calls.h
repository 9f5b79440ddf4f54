// Which rows of a step go through the graph together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace chai {

// Divides rows into calls, the one with the shortest rows first: of all ways to cut the rows, in the order of
// their lengths, the one with the least sum of rows times longest row, where a call counts as so many tokens
// more. tests/data/paging_cases.json holds this and Python's to the same.
//   lengths: new tokens of each row, at least 1
// Returns indices into `lengths`, ascending in each call.
std::vector<std::vector<std::size_t>> plan_calls(const std::vector<std::int64_t>& lengths);

}  // namespace chai
