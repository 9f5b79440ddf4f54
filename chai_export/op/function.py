"""ONNX function bodies: the ops on standard operators only. A bundle carries those it needs as model-local
functions, so that any ONNX runtime can run it without our libraries, more slowly.

Storage and optional inputs change what a body is made of, so there is one for each form; a form is an
*overload* of the function, and a node names the one it means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import onnx
import onnx.parser

from chai_export.op import text_attend, text_cache, text_map
from chai_export.op.attributes import Attributes
from chai_export.op.schema import DOMAIN, OP_TYPE, SHARED_OP_TYPE, signature
from chai_export.op.storage import BITS, SCALES_PER_GROUP

MIN_OPSET = 18
"""ReduceMin and ReduceMax take today's form, axes as an input, from opset 18."""


@dataclass(frozen=True)
class Form:
    """What decides the structure of a body: the storage of keys and values, and what is added to scores."""

    key_bits: int = 0
    value_bits: int = 0
    sinks: bool = False
    slopes: bool = False
    softcap: bool = False

    @staticmethod
    def of(attributes: Attributes, *, sinks: bool = False, slopes: bool = False) -> Form:
        """The form of a node with these attributes and optional inputs."""
        return Form(attributes.key_bits, attributes.value_bits, sinks, slopes, attributes.softcap != 0)

    @property
    def overload(self) -> str:
        """The name of the form: "k8v4", "k0v0_sinks_softcap"."""
        parts = [f"k{self.key_bits}v{self.value_bits}"]
        parts += [name for name in ("sinks", "slopes", "softcap") if getattr(self, name)]
        return "_".join(parts)

    def absent(self, op_type: str = OP_TYPE) -> set[str]:
        """The optional inputs and outputs that a node of this form does not have."""
        has: Mapping[str, bool] = {
            "key_scales": self.key_bits in SCALES_PER_GROUP,
            "value_scales": self.value_bits in SCALES_PER_GROUP,
            "sinks": self.sinks,
            "alibi_slopes": self.slopes,
        }
        of = signature(op_type)
        optional = [each for each in (*of.inputs, *of.outputs) if each.optional]
        return {each.name for each in optional if not has[each.follows or each.name]}


def all_forms() -> list[Form]:
    """Every storage of keys and of values with everything that is added to scores."""
    terms = list(product((False, True), repeat=3))
    return [Form(key_bits, value_bits, *each) for key_bits in BITS for value_bits in BITS for each in terms]


def form_named(overload: str) -> Form:
    """The form with this name; KeyError if there is none."""
    return {form.overload: form for form in all_forms()}[overload]


@lru_cache
def function_proto(opset: int, form: Form, op_type: str = OP_TYPE) -> onnx.FunctionProto:
    """The function body of an op, importing the opset of the model it is to stand in.

    Args:
        opset: version of the default ONNX domain, at least 18.
        form: of the node.
        op_type: ClusteredHeadAttention or SharedClusteredHeadAttention.

    Raises:
        ValueError: the opset is older than 18.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"the function body needs opset {MIN_OPSET} or newer, got {opset}")
    of = signature(op_type)
    body = _shared_cache(form) if op_type == SHARED_OP_TYPE else _own_cache(form)
    # Every output of a function has a maker; nobody reads those that nodes of this form do not have.
    body += "".join(
        f"  {name} = Identity (zero_f)\n" for name in of.output_names if name in form.absent(op_type)
    )
    return parsed(op_type, of.input_names, of.output_names, body, opset, form)


def parsed(
    op_type: str, inputs: Sequence[str], outputs: Sequence[str], body: str, opset: int, form: Form
) -> onnx.FunctionProto:
    """A function from ONNX's text form, without what none of its outputs needs."""
    header = (
        f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n'
        f"{op_type} <{', '.join(signature(op_type).attribute_names)}>"
        f" ({', '.join(inputs)}) => ({', '.join(outputs)})\n"
    )
    function = onnx.parser.parse_function(header + "{\n" + body + "}\n")
    function.overload = form.overload
    _drop_unused(function)
    return function


def _drop_unused(function: onnx.FunctionProto) -> None:
    """Remove, in place, what the pieces of all forms need and this form does not."""
    needed = set(function.output)
    kept = []
    for node in reversed(function.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads(node))
    del function.node[:]
    function.node.extend(reversed(kept))


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those in its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        names.update(output.name for output in attribute.g.output)
        for inner in attribute.g.node:
            names |= _reads(inner)
    return names


def _own_cache(form: Form) -> str:
    terms = {"sinks": form.sinks, "slopes": form.slopes, "softcap": form.softcap}
    return (
        text_map.CONSTANTS
        + text_map.PAGE_SIZES
        + text_map.SIZES
        + text_map.ROWS
        + text_cache.WINDOW
        + text_attend.probe(**terms)
        + text_map.chosen_map(text_map.STEPS_IF_FRESH)
        + text_map.slots("map")
        + text_cache.WIDTHS
        + text_cache.OWNERS
        + text_cache.append("key", "kept_key", "key_owned", "R", form.key_bits)
        + text_cache.append("value", "value_f", "owned_4", "G", form.value_bits)
        + _read("present_", form)
        + text_attend.attend(**terms)
    )


def _shared_cache(form: Form) -> str:
    terms = {"sinks": form.sinks, "slopes": form.slopes, "softcap": form.softcap}
    return (
        text_map.CONSTANTS
        + text_map.PAGE_SIZES
        + text_map.SIZES
        + text_map.ROWS
        + text_cache.WINDOW
        + text_map.KEPT_MAP
        + text_map.slots("kept_map")
        + text_attend.probe(**terms)
        + text_map.GIVEN_MAP
        + "  map_kv = Div (map, group_0)\n  table = Cast <to: int = 7> (page_table)\n"
        + _read("", form)
        + text_attend.attend(**terms)
    )


def _read(prefix: str, form: Form) -> str:
    return (
        text_cache.PAGES
        + "  key_defined = And (seen_4, slot_used_4)\n"
        + text_cache.cached("key", f"{prefix}key", "key_defined", form.key_bits)
        + text_cache.cached("value", f"{prefix}value", "seen_4", form.value_bits)
    )
