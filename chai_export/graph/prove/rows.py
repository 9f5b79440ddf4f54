"""Proof that what a bundle's graph computes from positions belongs to a row: not to a call.

Rotary factors that a graph chooses for a whole call (by its longest row, its largest position, the width of
a mask) are right for one row fed at once and wrong, without a word, in a batch or in chunks. So each value
that is made of positions and read by something else is compared, for short and long rows: in a batch, and
token by token alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from chai_export.bundle.graph_io import INPUT_IDS, LENGTHS, PAST_LENGTHS, ROPE_LENGTHS
from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.prove.evaluate import Array, EvaluationError, Slice, cut

LONGEST = 1 << 21
"""Tokens of the longest row that is looked at: twice the longest context of any model known."""

HELP = "export the model with `chai-export export`, or with rotary factors that depend on positions alone"

_INPUTS = (LENGTHS, PAST_LENGTHS, ROPE_LENGTHS)
_TOLERANCE = 1e-5
_TOKENS = 3


def made_of_positions(graph: ir.Graph, sources: Collection[ir.Value]) -> set[ir.Value]:
    """``sources`` and all that is computed from them, from sizes and from constants alone."""
    made = set(sources)
    for node in graph:
        sized = node.op_type == "Shape" and node.domain == ""
        if sized or all(value in made or is_constant(value) for value in node.inputs if value is not None):
            made.update(node.outputs)
    return made


def is_constant(value: ir.Value) -> bool:
    """Whether the graph itself holds the value; tables in other files are looked up, not computed with."""
    tensor = value.const_value
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor)


class RowValues:
    """A value of a bundle's graph that only positions decide, evaluated for rows of one's choice."""

    def __init__(self, graph: ir.Graph, roles: Roles, value: ir.Value) -> None:
        self._roles = roles
        self._slice: Slice = cut(graph, [], [value], roles)

    def __call__(self, rows: Sequence[tuple[int, int, int]]) -> Array:
        """The array for rows of (past tokens, new tokens, length that the rotary factors follow).

        Raises:
            EvaluationError: it cannot be evaluated.
        """
        past, new, total = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        sizes = Sizes(len(rows), int(new.max()), 1)
        feeds: dict[str, Array] = {
            INPUT_IDS: np.zeros((sizes.batch, sizes.tokens), np.int64),
            LENGTHS: new,
            PAST_LENGTHS: past,
            ROPE_LENGTHS: total,
        }
        given = {value: feeds[str(value.name)] for value in self._slice.inputs if value.name in feeds}
        (array,) = self._slice.run(self._roles, sizes, given)
        return np.asarray(array)


def prove_rows(graph: ir.Graph, roles: Roles, limit: int | None) -> None:
    """Compare what positions decide in a batch of two very different rows with the same for each row alone.

    Args:
        graph: of a bundle, finished.
        roles: of its source.
        limit: positions that its tables have, None without tables.

    Raises:
        ChaiError: a value differs, or cannot be evaluated.
    """
    sources = [value for value in graph.inputs if value.name in _INPUTS]
    values = _read_elsewhere(graph, sources)
    sizes_alone = set(values) - _content_of(graph, sources)
    longest = min(limit or LONGEST, LONGEST)
    lengths = [n for n in (1 << k for k in range(3, 22)) if n < longest]
    for value in values:
        try:
            evaluate = RowValues(graph, roles, value)
            if value in sizes_alone and evaluate([(0, 1, 1)]).dtype.kind in "iub":
                continue  # the shape of a call's tensors, which is another for another call
            for length in [*lengths, longest]:
                _compare(value, evaluate, length)
        except EvaluationError as error:
            raise ChaiError(
                f"{value.name} is made of positions and cannot be evaluated ({error}); {HELP}"
            ) from error


def _compare(value: ir.Value, evaluate: RowValues, length: int) -> None:
    new = min(_TOKENS, length)
    short = (0, min(2, length), min(2, length))
    long = (length - new, new, length)
    both = evaluate([short, long])
    for row, (past, count, total) in enumerate((short, long)):
        for token in range(count):
            alone = evaluate([(past + token, 1, total)])
            if both.ndim != alone.ndim or not close(_pick(both, alone, row, token), alone):
                raise ChaiError(
                    f"{value.name} is made of positions, and in a row of {total} tokens it changes with the "
                    f"other rows of a call or with the cut into calls (tried with {length} tokens); rotary "
                    f"factors would be wrong in batches and chunks: {HELP}"
                )


def _pick(array: Array, like: Array, row: int, token: int) -> Array:
    """The part of ``array`` that belongs to one row and token, given its shape for one of each."""
    index = []
    places = iter((row, token))
    for size, one in zip(array.shape, like.shape, strict=True):
        place = next(places, 0) if size != one else None
        index.append(slice(None) if place is None else slice(place, place + 1))
    return array[tuple(index)]


def close(a: Array, b: Array) -> bool:
    """Whether two arrays are the same but for the last bits of float32."""
    if a.shape != b.shape:
        return False
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return bool((difference <= _TOLERANCE * np.maximum(1.0, np.abs(b.astype(np.float64)))).all())


def _content_of(graph: ir.Graph, sources: Collection[ir.Value]) -> set[ir.Value]:
    """What the numbers in ``sources`` reach, and not their shapes alone."""
    reached = set(sources)
    for node in graph:
        sized = node.op_type == "Shape" and node.domain == ""
        if not sized and any(value in reached for value in node.inputs):
            reached.update(node.outputs)
    return reached


def _read_elsewhere(graph: ir.Graph, sources: list[ir.Value]) -> list[ir.Value]:
    made = made_of_positions(graph, sources)
    moving = set(sources)
    found = []
    for node in graph:
        if node.outputs[0] in made and any(value in moving for value in node.inputs):
            moving.update(node.outputs)
            found += [v for v in node.outputs if any(r.outputs[0] not in made for r in v.consumers())]
    return found
