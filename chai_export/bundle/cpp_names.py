"""The names of a bundle graph's inputs and outputs as a C++ header, so that the C++ runner writes none out.

``python -m chai_export.bundle.cpp_names`` prints it; plugins/runner/graph_names.h is compared with it.
"""

from __future__ import annotations

import sys

from chai_export.bundle import graph_io

_NAMES = {
    "kInputIds": graph_io.INPUT_IDS,
    "kLengths": graph_io.LENGTHS,
    "kPastLengths": graph_io.PAST_LENGTHS,
    "kOutputPositions": graph_io.OUTPUT_POSITIONS,
    "kHeadMap": graph_io.HEAD_MAP,
    "kLogits": graph_io.LOGITS,
    "kPresentHeadMap": graph_io.PRESENT_HEAD_MAP,
    "kPageTable": graph_io.PAGE_TABLE,
    # Of layer n of these: a point and n follow. Past and present caches have names of one kind.
    "kPastKey": graph_io.past_key(0).removesuffix(".0"),
    "kPastValue": graph_io.past_value(0).removesuffix(".0"),
    "kPast": graph_io.past_key(0).removesuffix("key.0"),
    "kPresent": graph_io.present_key(0).removesuffix("key.0"),
}


def header() -> str:
    """The text of the header."""
    names = "\n".join(f'inline constexpr char {name}[] = "{text}";' for name, text in _NAMES.items())
    point = graph_io.page_table(7).removeprefix(graph_io.PAGE_TABLE).removesuffix("7")
    return f"""\
// Generated from chai_export/bundle/graph_io.py by `python -m chai_export.bundle.cpp_names`: do not edit.
#pragma once

#include <cstdint>
#include <string>

namespace chai::graph {{

{names}

// The pages of the layers that have this window; 0: of those that have none.
inline std::string page_table(std::int64_t window) {{
  return window == 0 ? kPageTable : kPageTable + std::string("{point}") + std::to_string(window);
}}

}}  // namespace chai::graph
"""


if __name__ == "__main__":
    sys.stdout.write(header())
