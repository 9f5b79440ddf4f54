"""Take fused attention operators apart until query, new key and new value stand in the graph as values.

The op takes query [B,H,S,D], key and value [B,G,S,D] after RoPE. Fused operators hide them:

1. ``GroupQueryAttention`` with packed QKV gets a Split before it, with ``do_rotary`` two
   ``RotaryEmbedding`` nodes (positions become a graph input), with norm weights two norms of the heads.
2. Operators that take [B,S,H·D] get their operands split into heads and merged again in front of them, and
   the other way round behind them. The matchers hand on the split values; the rest falls away.
3. ``ScatterND`` into a cache whose axes were moved gets the new rows moved to [B,G,S,D] and back.
4. A ``GroupQueryAttention`` whose caches hold the window only gets whole ones: its output is the same.
5. ``FusedMatMul`` of two computed values becomes Transpose, MatMul and Mul.

What the graph computes does not change, but for rows of caches that nobody reads. An operator whose sizes are
not stated is left alone, for its matcher to refuse with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from chai_export.graph.read.builder import Builder, graph_input
from chai_export.graph.read.constants import rank, static_dim
from chai_export.graph.read.sizes import last_dim

MICROSOFT = "com.microsoft"
_BY_HEAD = [0, 2, 1, 3]
_TOKENS_FIRST = (2, 0, 1, 3)
_TOKENS_THIRD = (1, 2, 0, 3)


def unfuse(model: ir.Model) -> None:
    """Apply the steps above to every fused operator of the main graph, in place."""
    graph = model.graph
    builder = Builder(graph)
    for node in list(graph):
        if node.domain == MICROSOFT and node.op_type == "FusedMatMul":
            _matmul(builder, node)
        elif node.domain == MICROSOFT and node.op_type == "GroupQueryAttention":
            _group_query(builder, node)
        elif node.domain == MICROSOFT and node.op_type == "MultiHeadAttention":
            _multi_head(builder, node)
        elif node.domain == "" and node.op_type == "Attention" and has_merged_heads(node):
            _attention_3d(builder, node)
        elif node.domain == "" and node.op_type == "ScatterND":
            _scatter(builder, node)
    graph.sort()


def has_merged_heads(node: ir.Node) -> bool:
    """Whether an ``Attention`` takes [B,S,H·D], for which alone it needs the number of heads."""
    known = rank(node.inputs[0])
    return known == 3 or (known is None and _attribute(node, "q_num_heads") > 0)


def by_head(value: ir.Value | None) -> ir.Value | None:
    """The [B,H,S,D] value that was merged into ``value`` [B,S,H·D]; None if it was not."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    node = node.inputs[0].producer()
    if node is None or node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != _BY_HEAD:
        return None
    return node.inputs[0]


def output_by_head(node: ir.Node) -> ir.Value | None:
    """The [B,H,S,D] value that the output [B,S,H·D] of ``node`` was split into; None if it was not."""
    for reader in node.outputs[0].consumers():
        for mover in reader.outputs[0].consumers() if reader.op_type == "Reshape" else ():
            if mover.op_type == "Transpose" and list(mover.attributes["perm"].as_ints()) == _BY_HEAD:
                return mover.outputs[0]
    return None


@dataclass(frozen=True)
class _Heads:
    query: int
    kv: int
    dim: int


def _group_query(builder: Builder, node: ir.Node) -> None:
    query, key, value = node.inputs[:3]
    heads, kv = _attribute(node, "num_heads"), _attribute(node, "kv_num_heads")
    width = last_dim(query)
    if query is None or width is None or not heads or not kv:
        return
    packed = key is None or value is None
    parts = heads + 2 * kv if packed else heads
    if width % parts:
        return
    sizes = _Heads(heads, kv, width // parts)
    if _attribute(node, "sliding_window_cache"):
        node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", 0)
    if packed:
        cuts = builder.integers(heads * sizes.dim, kv * sizes.dim, kv * sizes.dim)
        names = tuple(f"{node.name}/{part}" for part in ("query", "key", "value"))
        first = builder.op("Split", query, cuts, axis=-1, outputs=names)
        split = first.producer()
        assert split is not None
        for part in split.outputs:
            part.type = query.type
        query, key, value = split.outputs
    assert key is not None
    assert value is not None
    split_query = _split(builder, query, heads, sizes.dim, f"{node.name}/query_by_head")
    split_key = _split(builder, key, kv, sizes.dim, f"{node.name}/key_by_head")
    split_value = _split(builder, value, kv, sizes.dim, f"{node.name}/value_by_head")
    split_query, split_key = _norms(builder, node, split_query, split_key)
    if _attribute(node, "do_rotary"):
        split_query = _rotate(builder, node, split_query, heads, sizes.dim)
        split_key = _rotate(builder, node, split_key, kv, sizes.dim)
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
        for index in (7, 8, 9):
            if index < len(node.inputs):
                node.replace_input_with(index, None)
    node.replace_input_with(0, _merge(builder, split_query, heads * sizes.dim))
    node.replace_input_with(1, _merge(builder, split_key, kv * sizes.dim))
    node.replace_input_with(2, _merge(builder, split_value, kv * sizes.dim))
    _split_output(builder, node, heads, sizes.dim)


def _norms(builder: Builder, node: ir.Node, query: ir.Value, key: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Norms of each head that the operator would apply before RoPE, as nodes of their own."""
    weights = [node.inputs[i] if i < len(node.inputs) else None for i in (14, 15)]
    if weights[0] is None or weights[1] is None:
        return query, key
    epsilon = node.attributes.get("qk_norm_epsilon")
    normed = []
    for value, weight, what in ((query, weights[0], "query"), (key, weights[1], "key")):
        name = f"{node.name}/{what}_norm"
        result = builder.op(
            "SimplifiedLayerNormalization",
            value,
            weight,
            name=name,
            axis=-1,
            epsilon=epsilon.as_float() if epsilon is not None else 1e-6,
            stash_type=1,
        )
        result.type, result.shape = value.type, value.shape
        normed.append(result)
    for index in (14, 15):
        node.replace_input_with(index, None)
    return normed[0], normed[1]


def _rotate(builder: Builder, node: ir.Node, value: ir.Value, heads: int, dim: int) -> ir.Value:
    cos, sin = node.inputs[7:9]
    given = node.inputs[9] if len(node.inputs) > 9 else None
    half = static_dim(cos, 1)
    partial = half is not None and 2 * half < dim
    result = builder.op(
        "RotaryEmbedding",
        value,
        given if given is not None else _position_ids(builder.graph),
        cos,
        sin,
        domain=MICROSOFT,
        name=f"{value.name}/rotated",
        interleaved=_attribute(node, "rotary_interleaved"),
        num_heads=heads if partial else 0,
        rotary_embedding_dim=2 * half if partial and half is not None else 0,
    )
    result.type, result.shape = value.type, value.shape
    return result


def _position_ids(graph: ir.Graph) -> ir.Value:
    """The position ids [B,S]: an input of the graph, added where there is none."""
    for value in graph.inputs:
        if value.name == "position_ids":
            return value
    tokens = next((value for value in graph.inputs if value.name == "input_ids"), None)
    result = graph_input("position_ids", ir.DataType.INT64, ["batch", "tokens"])
    if tokens is not None and tokens.shape is not None:
        result.shape = tokens.shape.copy()
    graph.inputs.append(result)
    return result


def _multi_head(builder: Builder, node: ir.Node) -> None:
    heads, width = _attribute(node, "num_heads"), last_dim(node.inputs[0])
    if not heads or width is None or width % heads or rank(node.inputs[1]) not in (None, 3):
        return
    value_width = last_dim(node.inputs[2])
    dim, value_dim = width // heads, (value_width or width) // heads
    past = len(node.inputs) > 7 and node.inputs[6] is not None and node.inputs[7] is not None
    for index, size in ((0, dim), (1, dim), (2, value_dim)) if past else ((0, dim),):
        _pass_by_head(builder, node, index, heads, size)
    _split_output(builder, node, heads, value_dim)


def _attention_3d(builder: Builder, node: ir.Node) -> None:
    heads, kv = _attribute(node, "q_num_heads"), _attribute(node, "kv_num_heads")
    width, value_width = last_dim(node.inputs[0]), last_dim(node.inputs[2])
    if not heads or not kv or width is None or width % heads or value_width is None or value_width % kv:
        return
    dim, value_dim = width // heads, value_width // kv
    past = len(node.inputs) > 5 and node.inputs[4] is not None and node.inputs[5] is not None
    operands = ((0, heads, dim), (1, kv, dim), (2, kv, value_dim))
    for index, count, size in operands if past else operands[:1]:
        _pass_by_head(builder, node, index, count, size)
    _split_output(builder, node, heads, value_dim)


def _scatter(builder: Builder, node: ir.Node) -> None:
    """A cache [B,G,C,D] written as [C,B,G,D]: move the new rows to the cache's own order and back."""
    data, indices, rows = node.inputs[:3]
    before = data.producer() if data is not None else None
    if before is None or before.op_type != "Transpose" or rows is None or indices is None:
        return
    if tuple(before.attributes["perm"].as_ints()) != _TOKENS_FIRST:
        return
    moved = builder.op("Transpose", rows, perm=list(_TOKENS_THIRD), name=f"{node.name}/rows")
    back = builder.op("Transpose", moved, perm=list(_TOKENS_FIRST), name=f"{node.name}/rows_tokens_first")
    moved.type = back.type = rows.type
    if rows.shape is not None and len(rows.shape) == 4:
        moved.shape = ir.Shape([rows.shape[axis] for axis in _TOKENS_THIRD])
        back.shape = rows.shape.copy()
    node.replace_input_with(2, back)


def _matmul(builder: Builder, node: ir.Node) -> None:
    """A MatMul into which onnxruntime put the scales and transposes around it; with a weight it stays."""
    left, right = node.inputs[:2]
    batched = _attribute(node, "transBatchA") or _attribute(node, "transBatchB")
    if left is None or right is None or batched or left.is_initializer() or right.is_initializer():
        return
    operands = [
        _last_two_swapped(builder, value, f"{node.name}/operand_{index}") if _attribute(node, name) else value
        for index, (value, name) in enumerate(((left, "transA"), (right, "transB")))
    ]
    product = builder.op("MatMul", *operands, name=f"{node.name}/product")
    old = node.outputs[0]
    product.type, product.shape = old.type, old.shape
    alpha = node.attributes.get("alpha")
    factor = alpha.as_float() if alpha is not None else 1.0
    if factor != 1.0:
        dtype = old.dtype or left.dtype or ir.DataType.FLOAT
        scale = builder.constant(np.array(factor, dtype.numpy()), f"{node.name}/alpha")
        scaled = builder.op("Mul", product, scale, name=f"{node.name}/scaled")
        scaled.type, scaled.shape = old.type, old.shape
        product = scaled
    ir.convenience.replace_all_uses_with(old, product)
    builder.graph.remove(node, safe=True)


def _last_two_swapped(builder: Builder, value: ir.Value, name: str) -> ir.Value:
    axes = list(range(rank(value) or 4))
    axes[-2:] = axes[:-3:-1]
    moved = builder.op("Transpose", value, perm=axes, name=name)
    moved.type = value.type
    if value.shape is not None:
        moved.shape = ir.Shape([value.shape[axis] for axis in axes])
    return moved


def _pass_by_head(builder: Builder, node: ir.Node, index: int, heads: int, dim: int) -> None:
    value = node.inputs[index]
    assert value is not None
    split = _split(builder, value, heads, dim, f"{node.name}/operand_{index}_by_head")
    node.replace_input_with(index, _merge(builder, split, heads * dim))


def _split(builder: Builder, value: ir.Value, heads: int, dim: int, name: str) -> ir.Value:
    """[B,S,heads·dim] to [B,heads,S,dim]."""
    reshaped = builder.op("Reshape", value, builder.integers(0, 0, heads, dim), name=f"{name}/split")
    result = builder.op("Transpose", reshaped, perm=_BY_HEAD, name=name)
    reshaped.type = result.type = value.type
    reshaped.shape, result.shape = ir.Shape([None, None, heads, dim]), ir.Shape([None, heads, None, dim])
    return result


def _merge(builder: Builder, value: ir.Value, width: int) -> ir.Value:
    """[B,heads,S,dim] to [B,S,heads·dim]."""
    moved = builder.op("Transpose", value, perm=_BY_HEAD, name=f"{value.name}/by_token")
    result = builder.op("Reshape", moved, builder.integers(0, 0, width), name=f"{value.name}/merged")
    moved.type = result.type = value.type
    result.shape = ir.Shape([None, None, width])
    return result


def _split_output(builder: Builder, node: ir.Node, heads: int, dim: int) -> None:
    output = node.outputs[0]
    readers = [(use.node, use.idx) for use in output.uses()]
    merged = _merge(builder, _split(builder, output, heads, dim, f"{node.name}/output_by_head"), heads * dim)
    for reader, index in readers:
        reader.replace_input_with(index, merged)


def _attribute(node: ir.Node, name: str) -> int:
    """An integer attribute, 0 without one."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0
