"""What a chooser decides for a whole call (:mod:`~chai_export.graph.rewrite.rope_switch`), by row instead."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.prove.evaluate import EvaluationError, cut
from chai_export.graph.prove.rows import HELP, RowValues, close
from chai_export.graph.read.builder import Builder
from chai_export.graph.rewrite.rope_switch import (
    EDGE_TOKENS,
    Edge,
    RopeSwitch,
    fixed_values,
    positions_of,
    tables_of,
)

_ANY = Sizes(1, 1, 1)


def choose_by_row(
    builder: Builder, roles: Roles, switch: RopeSwitch, rope_lengths: ir.Value
) -> dict[Edge, ir.Value]:
    """Replace the edges of one switch, in place, and return what took the place of each that is no table.

    ``rope_lengths`` int32 [B] are the lengths that decide.

    Raises:
        ChaiError: the tables for shorter rows end before they do, or cannot be evaluated.
    """
    computed = [_computed(builder, roles, switch, longer=longer) for longer in (False, True)]
    both = {value: (computed[0][value], computed[1][value]) for value in computed[0]}
    limit = builder.constant(np.array(switch.length, np.int32), f"rope_switch_{switch.length}")
    longer = builder.op("Greater", rope_lengths, limit)
    chosen: dict[Edge, ir.Value] = {}
    for edge in switch.edges:
        readers = [use for use in edge.value.uses() if use.node not in switch.nodes]
        if edge.rank is None:
            for node in dict.fromkeys(use.node for use in readers):
                _read_joined_tables(builder, node, both, longer, switch.length)
            continue
        short, long = both[edge.value]
        by_row = builder.op("Unsqueeze", longer, builder.integers(*range(1, edge.rank)))
        value = chosen[edge] = builder.op("Where", by_row, long, short)
        value.type = edge.value.type
        for use in readers:
            use.node.replace_input_with(use.idx, value)
    return chosen


def _read_joined_tables(
    builder: Builder,
    node: ir.Node,
    both: dict[ir.Value, tuple[ir.Value, ir.Value]],
    longer: ir.Value,
    length: int,
) -> None:
    """Give a RotaryEmbedding the table of longer rows behind that of shorter ones, and where to read."""
    rows = set()
    for index in tables_of(node):
        table = node.inputs[index]
        if table not in both:
            continue  # another switch's, or put here by an earlier edge of this one
        parts = [value.const_value.numpy() for value in both[table] if value.const_value is not None]
        rows.add(len(parts[0]))
        node.replace_input_with(index, builder.constant(np.concatenate(parts), f"{table.name}/joined"))
    if not rows:
        return
    if len(rows) > 1 or min(rows) < length:
        raise ChaiError(
            f"node {node.name!r} reads tables of {sorted(rows)} positions in rows of up to {length} tokens; "
            f"{HELP}"
        )
    index, positions = positions_of(node)
    assert positions is not None
    behind = builder.op("Add", positions, builder.integer(min(rows)))
    place = builder.op("Where", builder.op("Unsqueeze", longer, builder.integers(1)), behind, positions)
    place.type = positions.type
    node.replace_input_with(index, place)


def _computed(
    builder: Builder, roles: Roles, switch: RopeSwitch, *, longer: bool
) -> dict[ir.Value, ir.Value]:
    """Every value that the chooser decides, as it is for rows of one kind."""
    suffix = "longer" if longer else "shorter"
    answer = np.full(switch.shape, switch.longer == longer)
    fixed = fixed_values(switch.nodes, switch.chooser)
    needed = [value for value in fixed if value is not switch.chooser]
    try:
        part = cut(builder.graph, [switch.chooser], needed, roles) if needed else None
        arrays = part.run(roles, _ANY, {switch.chooser: answer}) if part is not None else []
    except EvaluationError as error:
        raise ChaiError(
            f"what {switch.chooser.name} chooses cannot be evaluated ({error}); {HELP}"
        ) from error
    made: dict[ir.Value, ir.Value] = {}
    for value, array in zip([switch.chooser, *needed], [answer, *arrays], strict=True):
        dtype = value.dtype.numpy() if value.dtype is not None else array.dtype
        made[value] = builder.constant(np.asarray(array).astype(dtype), f"{value.name}/{suffix}")
    for node in switch.nodes:
        if node.outputs[0] in fixed:
            continue
        outputs = [ir.Value(name=f"{value.name}/{suffix}", type=value.type) for value in node.outputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            [made.get(value, value) if value is not None else None for value in node.inputs],
            attributes=list(node.attributes.values()),
            outputs=outputs,
            name=f"{node.name}/{suffix}",
        )
        builder.graph.append(copy)
        made.update(zip(node.outputs, outputs, strict=True))
    return made


def prove_edges(graph: ir.Graph, roles: Roles, length: int, edges: Mapping[Edge, ir.Value]) -> None:
    """Compare what took the place of switched values with the source's, on both sides of the length.

    Raises:
        ChaiError: they differ.
    """
    for edge, value in edges.items():
        assert edge.expected is not None
        for expected, total in zip(edge.expected, (length, length + 2), strict=True):
            new = min(EDGE_TOKENS, total)
            try:
                array = RowValues(graph, roles, value)([(total - new, new, total)])
            except EvaluationError as error:
                raise ChaiError(f"{edge.value.name} cannot be evaluated by row ({error}); {HELP}") from error
            if not close(array, expected):
                raise ChaiError(
                    f"the rewritten model differs from the source: {edge.value.name} in a row of {total} "
                    "tokens; nothing was written; report this model"
                )
