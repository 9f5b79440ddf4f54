"""Graphs without a position_ids input: find where they compute positions and put ours there.

Such graphs number tokens from the length of the past (or from the attention mask). What they compute is
recognised by evaluating it, not by its nodes:

1. Index values are integers (and their casts and reshapes) made only from sizes of inputs, the mask and
   constants.
2. An index value that something else reads is compared, on several sizes, with past + i plus a constant.
3. Equal ones are replaced by position_ids of the right rank; the others must not depend on the past.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.prove.evaluate import Array, EvaluationError, Slice, cut
from chai_export.graph.read.builder import Builder

_SIZES = (Sizes(3, 4, 5), Sizes(2, 3, 7), Sizes(3, 5, 2))
_RESHAPES = frozenset({"Cast", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Identity"})
_INDEX_TYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def replace_derived_positions(builder: Builder, roles: Roles, position_ids: ir.Value) -> None:
    """Replace everything that equals the position of each token by values made from ``position_ids``.

    Raises:
        ChaiError: a value depends on the past in a way that is not a position.
    """
    for value in _frontier(builder.graph, roles, position_ids):
        layout = _position_layout(builder.graph, value, roles)
        if layout is None:
            continue
        axes, offset = layout
        new = position_ids
        if offset:
            new = builder.op("Add", new, builder.integer(offset))
        if axes:
            new = builder.op("Unsqueeze", new, builder.integers(*axes))
        if value.dtype not in (None, ir.DataType.INT64):
            new = builder.op("Cast", new, to=value.dtype.value)
        new.type = value.type
        ir.convenience.replace_all_uses_with(value, new)


def _frontier(graph: ir.Graph, roles: Roles, ours: ir.Value) -> list[ir.Value]:
    """Index values that depend on the past or the mask and are read by something that is not one."""
    sources = (*roles.caches, roles.attention_mask, roles.cache_position)
    old = {value for value in sources if value is not None}
    index: set[ir.Value] = {roles.input_ids, *old}
    moving: set[ir.Value] = set(old)
    own = _ancestors(ours)
    for node in graph:
        if node in own or not node.outputs:
            continue
        inputs = [value for value in node.inputs if value is not None and not value.is_initializer()]
        output = node.outputs[0]
        from_shape = node.op_type == "Shape" and inputs[0] in index
        typed = output.dtype in _INDEX_TYPES or node.op_type in _RESHAPES
        computed = typed and inputs and all(value in index and value not in roles.caches for value in inputs)
        if from_shape or (computed and roles.input_ids not in inputs):
            index.add(output)
            if any(value in moving for value in inputs):
                moving.add(output)
    return [
        value
        for value in moving
        if value not in old and any(reader.outputs[0] not in index for reader in value.consumers())
    ]


def _ancestors(value: ir.Value) -> set[ir.Node]:
    nodes: set[ir.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(item for item in node.inputs if item is not None)
    return nodes


def _position_layout(graph: ir.Graph, value: ir.Value, roles: Roles) -> tuple[list[int], int] | None:
    """Axes to insert into [B, S] and the constant to add, if ``value`` is a position; None if it is fixed.

    Raises:
        ChaiError: it changes with the past but is no position.
    """
    sizes_tried = [roles.fit(sizes) for sizes in _SIZES]
    try:
        part = cut(graph, [], [value], roles)
        arrays = [_run(part, sizes, roles) for sizes in sizes_tried]
        first = sizes_tried[0]
        moved = _run(part, Sizes(first.batch, first.tokens, first.past + 1), roles)
    except EvaluationError as error:
        raise ChaiError(f"{value.name} depends on the past and cannot be evaluated ({error})") from error
    if arrays[0].shape == moved.shape and np.array_equal(arrays[0], moved):
        return None
    layouts = [_layout(array, sizes) for array, sizes in zip(arrays, sizes_tried, strict=True)]
    if layouts[0] is None or any(layout != layouts[0] for layout in layouts):
        node = value.producer()
        raise ChaiError(
            f"{value.name} ({node.op_type if node else 'input'}) depends on the past and is no position; "
            "export the model with position_ids as an input"
        )
    return layouts[0]


def _run(part: Slice, sizes: Sizes, roles: Roles) -> Array:
    feeds = roles.feeds(sizes, np.ones((sizes.batch, sizes.total), np.int64))
    (array,) = part.run(roles, sizes, {v: a for v, a in feeds.items() if v in part.inputs})
    return np.asarray(array)


def _layout(array: Array, sizes: Sizes) -> tuple[list[int], int] | None:
    """How ``array`` is laid out if it holds past + i + constant along one axis, else None."""
    token_axes = [axis for axis, size in enumerate(array.shape) if size == sizes.tokens]
    if len(token_axes) != 1:
        return None
    axis = token_axes[0]
    others = [i for i in range(array.ndim) if i != axis]
    before = [i for i in others if i < axis]
    if any(array.shape[i] not in (1, sizes.batch) for i in others):
        return None
    steps = np.arange(sizes.past, sizes.total).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    difference = array - steps
    offset = int(difference.flat[0])
    if not (difference == offset).all():
        return None
    if array.ndim == 1:
        return [], offset
    if not before or any(array.shape[i] != 1 for i in others if i != before[0]):
        return None
    return [i for i in others if i != before[0]], offset
