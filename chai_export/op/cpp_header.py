"""The signatures as a C++ header, so that no name, index, version or default is written twice.

``python -m chai_export.op.cpp_header`` prints it; a test compares it with plugins/include/chai/op_schema.h.
"""

from __future__ import annotations

import re
import sys

from chai_export.op.schema import DOMAIN, SIGNATURES
from chai_export.op.signature import VERSION, Attribute, Parameter, Signature

_HEAD = f"""\
// Generated from chai_export/op/schema.py by `python -m chai_export.op.cpp_header`: do not edit.
// The ops of domain "{DOMAIN}" as every implementation sees them; docs/op.md says what they mean.
#pragma once

#include <cstddef>
#include <cstdint>

// clang-format off
namespace chai::schema {{

inline constexpr char kDomain[] = "{DOMAIN}";

// Of both ops.
inline constexpr std::int64_t kVersion = {VERSION};

// Type variables: T activations, M maps and lengths, K and V storage of keys and values, F scales, A slopes.
enum class Type {{ T, M, K, V, F, A }};

struct Parameter {{
  const char* name;
  Type type;
  std::size_t rank;
  bool optional;
}};
"""


def header() -> str:
    """The text of the header."""
    return (
        _HEAD
        + "".join(map(_namespace, SIGNATURES.values()))
        + "\n}  // namespace chai::schema\n// clang-format on\n"
    )


def _namespace(of: Signature) -> str:
    name = _snake(of.op_type)
    attributes = "\n".join(f"  {_field(attribute)};" for attribute in of.attributes)
    names = "\n".join(f'    "{attribute.name}",' for attribute in of.attributes)
    return f"""
namespace {name} {{

inline constexpr char kOpType[] = "{of.op_type}";
{_parameters("Input", of.inputs)}
{_parameters("Output", of.outputs)}

struct Attributes {{
{attributes}
}};

inline constexpr const char* kAttributeNames[] = {{
{names}
}};

}}  // namespace {name}
"""


def _parameters(kind: str, parameters: tuple[Parameter, ...]) -> str:
    rows = "\n".join(map(_row, parameters))
    indices = "\n".join(
        f"inline constexpr std::size_t {_constant(p.name)} = {index};" for index, p in enumerate(parameters)
    )
    return f"""
// {kind}s by position.
{indices}

inline constexpr Parameter k{kind}s[] = {{
{rows}
}};"""


def _row(parameter: Parameter) -> str:
    optional = str(parameter.optional).lower()
    values = f'"{parameter.name}", Type::{parameter.type}, {len(parameter.dims)}, {optional}'
    return f"    {{{values}}},  // [{','.join(parameter.dims)}]"


def _field(attribute: Attribute) -> str:
    if isinstance(attribute.default, float):
        return f"float {attribute.name} = {attribute.default}F"
    return f"std::int64_t {attribute.name} = {attribute.default}"


def _constant(name: str) -> str:
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


if __name__ == "__main__":
    sys.stdout.write(header())
