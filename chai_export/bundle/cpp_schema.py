"""The schema of manifest.json as a C++ header: the C++ runner takes and refuses what this package does.

``python -m chai_export.bundle.cpp_schema`` prints it; plugins/runner/manifest_schema.h is compared with it.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from chai_export.bundle.manifest import Manifest

_HEAD = """\
// Generated from chai_export/bundle/manifest.py by `python -m chai_export.bundle.cpp_schema`: do not edit.
#pragma once

namespace chai {

// A JSON schema, for check_schema().
inline constexpr char kManifestSchema[] = R"json("""
_TAIL = """)json";

}  // namespace chai
"""
_FOR_PEOPLE = {"title", "description", "default"}
_CHECKED = {"additionalProperties", "anyOf", "const", "enum", "items", "maximum", "minimum", "pattern"}
_CHECKED |= {"properties", "propertyNames", "required", "type"}
_PATTERN = r"\^\[([^]]-[^]])+\]\{\d+\}\$"
"""What plugins/support/json_schema.cpp knows."""


def header() -> str:
    """The text of the header."""
    schema = Manifest.model_json_schema()
    return _HEAD + json.dumps(_checked(schema, schema["$defs"]), indent=1) + _TAIL


def _checked(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions in place, and what decides alone."""
    if "$ref" in schema:
        return _checked(definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
    result: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _FOR_PEOPLE or keyword == "$defs":
            continue
        if keyword not in _CHECKED:
            raise NotImplementedError(f"plugins/support/json_schema.cpp does not know {keyword}")
        if keyword == "pattern" and not re.fullmatch(_PATTERN, value):
            raise NotImplementedError(f"plugins/support/json_schema.cpp does not know the pattern {value}")
        if keyword == "properties":
            result[keyword] = {name: _checked(each, definitions) for name, each in value.items()}
        elif keyword == "anyOf":
            result[keyword] = [_checked(each, definitions) for each in value]
        elif isinstance(value, dict):
            result[keyword] = _checked(value, definitions)
        else:
            result[keyword] = value
    return result


if __name__ == "__main__":
    sys.stdout.write(header())
