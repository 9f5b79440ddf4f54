// Generated from chai_export/bundle/graph_io.py by `python -m chai_export.bundle.cpp_names`: do not edit.
#pragma once

#include <cstdint>
#include <string>

namespace chai::graph {

inline constexpr char kInputIds[] = "input_ids";
inline constexpr char kLengths[] = "lengths";
inline constexpr char kPastLengths[] = "past_lengths";
inline constexpr char kOutputPositions[] = "output_positions";
inline constexpr char kHeadMap[] = "head_map";
inline constexpr char kLogits[] = "logits";
inline constexpr char kPresentHeadMap[] = "present_head_map";
inline constexpr char kPageTable[] = "page_table";
inline constexpr char kPastKey[] = "past_key";
inline constexpr char kPastValue[] = "past_value";
inline constexpr char kPast[] = "past_";
inline constexpr char kPresent[] = "present_";

// The pages of the layers that have this window; 0: of those that have none.
inline std::string page_table(std::int64_t window) {
  return window == 0 ? kPageTable : kPageTable + std::string(".") + std::to_string(window);
}

}  // namespace chai::graph
