"""Forms A, B and F: a Softmax between two products, with the cache concatenated before.

1. The anchor is a Softmax over the last axis whose result, through NaN guards and casts only, is the first
   operand of a MatMul.
2. Upwards from the Softmax, through element-wise arithmetic only, stands one MatMul of two computed values:
   query and key. A Concat right above the softmax brings sinks: its first operand are the logits, and a Slice
   after the softmax takes the sinks off again. The largest logit may be subtracted first, which softmax
   forgets.
3. Query: constant factors are taken off it. Key and value go back to a Concat of a cache and new rows
   (:mod:`~chai_export.graph.match.trace_cache`); factors on the key are taken off too.
   Rows and heads may be one axis on the way through both products.
4. Everything between the two products is left to the mask proof, and which way the key was transposed to
   the numerical proof.

Form A (torch's scaled_dot_product_attention, opset 18 to 22) has the square root of the scale on query and
key, and so has form F (TorchScript, as optimum exports it); form B (transformers' eager attention) scales the
scores. One set of rules covers all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from chai_export.graph.match.form import Form
from chai_export.graph.match.geometry import site_geometry
from chai_export.graph.match.miss import NoMatch, Reached
from chai_export.graph.match.quantised import OPERATORS, quantised
from chai_export.graph.match.site import AttentionSite, CachedHeads, ScoreChain
from chai_export.graph.match.trace_cache import strip_scale, trace_cache
from chai_export.graph.read.constants import constant, rank

_GUARDS = frozenset({"Where", "IsNaN", "Cast", "Identity", "Dropout", "Reshape", "Slice"})
_ARITHMETIC = frozenset(
    {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Max", "Min", "Clip", "Identity", "Reshape", "Tanh"}
)
_NAMED = {
    "Concat": "something is appended to the scores before the mask",
}


def is_anchor(node: ir.Node) -> bool:
    """Whether ``node`` is a Softmax that leads into a MatMul or a cut of its last axis: attention-like."""
    if node.op_type != "Softmax" or node.domain != "":
        return False
    passed = _GUARDS | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
    followers = _consumers_through(node.outputs[0], passed)
    return any(follower.op_type in ("MatMul", "QLinearMatMul", "MatMulInteger") for follower in followers)


def match(node: ir.Node, opset: int) -> AttentionSite:
    """Match one Softmax.

    Raises:
        NoMatch: with the node and the reason.
    """
    del opset
    axis = node.attributes.get("axis")
    last = (rank(node.inputs[0]) or 4) - 1
    if axis is not None and axis.as_int() not in (-1, last):
        raise NoMatch(node, f"the softmax runs over axis {axis.as_int()}, not the last one")
    logits, sinks = _logits(node)
    product = _score_product(node, logits)
    after = _value_product(node)
    query, key = product.inputs
    assert query is not None
    assert key is not None
    merged = rank(query) == 3  # [B·H, S, D], as BLOOM has it
    query = _before_merging(query) if merged else query
    if query is None or rank(query) not in (None, 4):
        reason = f"the query has rank {rank(product.inputs[0])} instead of 4 [B, H, S, D]"
        chain = ScoreChain(scores=product.outputs[0], logits=logits, sinks=sinks)
        raise NoMatch(product, reason, Reached.SCORES, chain)
    keys = trace_cache(key, "the key")
    value = after.inputs[1]
    assert value is not None
    values = trace_cache(value, "the value")
    if not math.isclose(values.scale, 1.0):
        raise NoMatch(after, f"the value is multiplied by {values.scale:g} after the cache", Reached.CACHE)
    source, query_scale = strip_scale(query)
    heads = site_geometry(product, source, keys, values)
    output = _after_merging(after) if merged else after.outputs[0]
    return AttentionSite(
        form=_form(node, keys),
        anchor=node,
        query=source,
        key=keys,
        value=values,
        output=output,
        chain=ScoreChain(scores=product.outputs[0], logits=logits, sinks=sinks),
        scale=query_scale * keys.scale,
        heads=heads,
    )


def _form(node: ir.Node, keys: CachedHeads) -> Form:
    if keys.scale == 1.0:
        return Form.B
    # TorchScript names nodes by the path of their module, the dynamo exporter by kind and number.
    return Form.F if (node.name or "").startswith("/") else Form.A


def _logits(softmax: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Rule 2: what the softmax is over, and the sinks beside it."""
    value = _without_largest(softmax.inputs[0])
    node = value.producer() if value is not None else None
    last = (rank(value) or 4) - 1
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return softmax.inputs[0], None
    if node.attributes["axis"].as_int() not in (-1, last):
        return softmax.inputs[0], None
    return node.inputs[0], node.inputs[1]


def _without_largest(value: ir.Value | None) -> ir.Value | None:
    """x of x - max(x)."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Sub":
        return value
    operand, largest = node.inputs
    above = largest.producer() if largest is not None else None
    of_it = above is not None and above.op_type == "ReduceMax" and above.inputs[0] is operand
    return operand if of_it else value


def _score_product(softmax: ir.Node, logits: ir.Value | None) -> ir.Node:
    """Rule 2: the one MatMul of two computed values above the softmax."""
    found: list[ir.Node] = []
    blocked: list[ir.Node] = []
    seen: set[ir.Node] = set()
    stack = [logits]
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "MatMul" and node.domain == "":
            if all(constant(item) is None and not _is_weight(item) for item in node.inputs):
                found.append(node)
        elif node.op_type in _ARITHMETIC and node.domain == "":
            stack.extend(node.inputs)
        else:
            blocked.append(node)
    if len(found) == 1:
        return found[0]
    for node in blocked:
        if node.op_type in OPERATORS:
            raise quantised(node, "the scores", Reached.SCORES)
        if node.op_type in _NAMED and _has_product_above(node):
            raise NoMatch(node, _NAMED[node.op_type], Reached.SCORES)
    if found:
        raise NoMatch(softmax, f"{len(found)} products meet in the scores", Reached.SCORES)
    nearest = next((node for node in blocked if _has_product_above(node)), blocked[0] if blocked else None)
    raise NoMatch(
        nearest or softmax, "no product of query and key stands above the softmax", Reached.OPERATOR
    )


def _value_product(softmax: ir.Node) -> ir.Node:
    """Rule 1: the MatMul that weighs the values."""
    for node in _consumers_through(softmax.outputs[0], _GUARDS):
        if node.op_type == "MatMul" and node.domain == "":
            return node
        if node.op_type in OPERATORS:
            raise quantised(node, "the probabilities", Reached.SCORES)
    raise NoMatch(softmax, "the probabilities do not meet values", Reached.SCORES)


def _before_merging(value: ir.Value) -> ir.Value | None:
    """The [B,H,S,D] of a [B·H,S,D]."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None


def _after_merging(after: ir.Node) -> ir.Value:
    readers = list(after.outputs[0].consumers())
    if len(readers) != 1 or readers[0].op_type != "Reshape" or rank(readers[0].outputs[0]) != 4:
        raise NoMatch(
            after, "the attended values of all rows and heads are not split by head", Reached.RETURN
        )
    return readers[0].outputs[0]


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _has_product_above(node: ir.Node, depth: int = 6) -> bool:
    if depth == 0:
        return False
    for value in node.inputs:
        above = value.producer() if value is not None else None
        if above is not None and (above.op_type == "MatMul" or _has_product_above(above, depth - 1)):
            return True
    return False


def _consumers_through(value: ir.Value, passed: frozenset[str]) -> Iterator[ir.Node]:
    """Nodes reached downwards from ``value``, going on through operators in ``passed``."""
    stack = [value]
    while stack:
        for node in stack.pop().consumers():
            yield node
            if node.op_type in passed and node.domain == "":
                stack.extend(node.outputs)
