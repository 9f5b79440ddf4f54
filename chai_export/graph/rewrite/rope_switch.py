"""Graphs that choose their rotary factors by the longest row of a call: let every row choose for itself.

LongRoPE models have two sets of factors, one for rows of up to some length and one for longer rows. Exporters
compare the largest position, or the width of the mask, with that length once for all rows of the call:

    position_ids → ReduceMax → Greater → Where(long, short) → … → cos, sin        torch
    attention_mask → Shape → Greater → If → tables of cos and sin                 onnxruntime-genai
    position_ids → ReduceMax → GreaterOrEqual → Cast → Mul → Add(position_ids)    the same, for DirectML

A short row would be rotated as its longest companion is, and the first chunk of a long prompt otherwise than
the last. What such a graph computes is recognised by evaluating it:

1. A *chooser* is a scalar truth value that only positions, sizes and the mask decide and that changes once,
   as the length of a row grows.
2. What it decides and nothing but positions enters is computed for either answer, up to the values at its
   *edge*: those that something else reads.
3. There each row takes the one that its length asks for (input ``rope_lengths``): values with one row for
   each row of the batch by a Where, tables that a RotaryEmbedding reads by joining them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.prove.evaluate import Array, EvaluationError, Slice, cut
from chai_export.graph.prove.rows import HELP, LONGEST, is_constant, made_of_positions

EDGE_TOKENS = 3
"""Tokens at the end of a row for which the source's values are kept, to be compared with."""

_COMPARISONS = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})


@dataclass(frozen=True, eq=False)
class Edge:
    """A value that a chooser decides and that something else reads.

    ``rank`` counts its axes, of which the first is the batch; None for a table that RotaryEmbedding reads.
    ``expected`` are its arrays for the last three tokens of a row as long as the chooser allows, and of one
    two tokens longer.
    """

    value: ir.Value
    rank: int | None
    expected: tuple[Array, Array] | None


@dataclass(frozen=True, eq=False)
class RopeSwitch:
    """One chooser: rows of more than ``length`` tokens get what it decides when it is ``longer``."""

    chooser: ir.Value
    length: int
    longer: bool
    shape: tuple[int, ...]
    nodes: tuple[ir.Node, ...]
    edges: tuple[Edge, ...]


def find_switches(graph: ir.Graph, roles: Roles) -> list[RopeSwitch]:
    """The choosers of a normalised source graph, which is not changed.

    Raises:
        ChaiError: one decides something that cannot be chosen by row.
    """
    made = made_of_positions(graph, [value for value in _sources(roles) if value is not None])
    switches = []
    for node in graph:
        chooser = node.outputs[0] if node.op_type in _COMPARISONS and node.domain == "" else None
        if chooser is None or chooser not in made or not _may_be_scalar(chooser):
            continue
        change = _change(graph, chooser, roles)
        if change is not None:
            length, longer, shape = change
            nodes, values = _decided(graph, chooser, made)
            edges = tuple(_edge(graph, value, chooser, nodes, length, roles) for value in values)
            if edges:
                switches.append(RopeSwitch(chooser, length, longer, shape, tuple(nodes), edges))
    return switches


def _sources(roles: Roles) -> tuple[ir.Value | None, ...]:
    return (
        roles.position_ids,
        roles.attention_mask,
        roles.cache_position,
        roles.write_indices,
        roles.valid_lengths,
    )


def _may_be_scalar(value: ir.Value) -> bool:
    return value.shape is None or all(dim == 1 for dim in value.shape)


def _change(graph: ir.Graph, chooser: ir.Value, roles: Roles) -> tuple[int, bool, tuple[int, ...]] | None:
    """(longest row before the change, value after it, shape), if the length of a row changes it once."""
    try:
        part = cut(graph, [], [chooser], roles)

        def at(length: int, tokens: int = 1) -> Array:
            return _run(part, roles, Sizes(1, tokens, length - tokens))

        first, last = at(1), at(LONGEST)
        if first.size != 1 or last.size != 1 or bool(first) == bool(last):
            return None
        before, after = 1, LONGEST
        while after - before > 1:
            middle = (before + after) // 2
            before, after = (before, middle) if bool(at(middle)) == bool(last) else (middle, after)
        # A flag of prefill and decode changes too; the length of a row does not depend on how it is fed.
        whole = [(before, first), (after, last)]
        if any(bool(at(length, tokens)) != bool(want) for length, want in whole for tokens in {1, length}):
            return None
    except EvaluationError:
        return None  # what cannot be evaluated here is caught by the proof of the rows
    return before, bool(last), last.shape


def _run(part: Slice, roles: Roles, sizes: Sizes) -> Array:
    feeds = roles.feeds(sizes, np.ones((sizes.batch, sizes.total), np.int64))
    given = {value: array for value, array in feeds.items() if value in part.inputs}
    (array,) = part.run(roles, sizes, given)
    return np.asarray(array)


def _decided(graph: ir.Graph, chooser: ir.Value, made: set[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes between a chooser and its edge, in order, and the values at the edge."""
    decided, nodes = {chooser}, []
    for node in graph:
        if node.outputs[0] in made and any(value in decided for value in node.inputs):
            nodes.append(node)
            decided.update(node.outputs)
    inside = set(nodes)
    edge = [value for value in decided if any(reader not in inside for reader in value.consumers())]
    return nodes, [*edge, *(value for value in decided if value.is_graph_output() and value not in edge)]


def _edge(
    graph: ir.Graph, value: ir.Value, chooser: ir.Value, nodes: list[ir.Node], length: int, roles: Roles
) -> Edge:
    """How ``value`` can be chosen by row.

    Raises:
        ChaiError: it cannot.
    """
    outside = [use for use in value.uses() if use.node not in nodes]
    what = f"{value.name}, which {chooser.name} chooses for a whole call (rows of more than {length} tokens)"
    fixed = fixed_values(nodes, chooser)
    if value in fixed:
        if not all(use.idx in tables_of(use.node) and positions_of(use.node)[1] for use in outside):
            raise ChaiError(f"node {outside[0].node.name!r} reads {what}, and is no RotaryEmbedding; {HELP}")
        return Edge(value, None, None)
    if any(_has_branches(node) and node.outputs[0] not in fixed for node in nodes):
        raise ChaiError(f"{what}, comes out of a branch that reads positions; {HELP}")
    try:
        part = cut(graph, [], [value], roles)
        shapes = [_run(part, roles, Sizes(batch, 3, 2)).shape for batch in (2, 5)]
        expected = [
            _run(part, roles, Sizes(1, min(EDGE_TOKENS, n), n - min(EDGE_TOKENS, n)))
            for n in (length, length + 2)
        ]
    except EvaluationError as error:
        raise ChaiError(f"{what}, cannot be evaluated ({error}); {HELP}") from error
    by_row = len(shapes[0]) > 1 and (shapes[0][0], shapes[1][0]) in ((2, 5), (1, 1))
    if not by_row or value.is_graph_output():
        raise ChaiError(f"{what}, has no row of its own for each row of the batch; {HELP}")
    return Edge(value, len(shapes[0]), (expected[0], expected[1]))


def fixed_values(nodes: Sequence[ir.Node], chooser: ir.Value) -> dict[ir.Value, None]:
    """What the chooser alone decides, with no positions in it; the chooser first."""
    fixed: dict[ir.Value, None] = {chooser: None}
    for node in nodes:
        if all(value in fixed or is_constant(value) for value in node.inputs if value is not None):
            fixed.update(dict.fromkeys(node.outputs))
    return fixed


def _has_branches(node: ir.Node) -> bool:
    return any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())


def tables_of(node: ir.Node) -> tuple[int, ...]:
    """Which inputs of a node are tables of cos and sin by position."""
    if node.op_type != "RotaryEmbedding" or len(node.inputs) < 4:
        return ()
    return (2, 3) if node.domain else (1, 2)


def positions_of(node: ir.Node) -> tuple[int, ir.Value | None]:
    """Which input of a RotaryEmbedding with tables has its positions [B,S], and they; None of other ranks."""
    index = 1 if node.domain else 3
    value = node.inputs[index]
    return index, value if value is not None and value.shape is not None and len(value.shape) == 2 else None
