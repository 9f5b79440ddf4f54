"""Random edits of a graph: such that keep its meaning, and such that change what its attention computes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.GraphProto, random.Random], bool]
"""Changes a graph in place; False if there was nothing to change."""

ANCHORS = ("Softmax", "Attention", "GroupQueryAttention", "MultiHeadAttention")
FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def fresh(graph: onnx.GraphProto, stem: str) -> str:
    return f"{stem}_{len(graph.node)}_{len(graph.initializer)}"


def insert(
    graph: onnx.GraphProto, reader: onnx.NodeProto, slot: int, op: str, *extra: str, **attrs: object
) -> None:
    """Put an operator between a node's input and what it read."""
    name = fresh(graph, f"inserted_{op}")
    node = helper.make_node(op, [reader.input[slot], *extra], [name], name=name, **attrs)
    graph.node.insert(list(graph.node).index(reader), node)
    reader.input[slot] = name


def weight(graph: onnx.GraphProto, array: np.ndarray) -> str:
    name = fresh(graph, "mutation")
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def element_type(graph: onnx.GraphProto) -> int:
    return next(v.type.tensor_type.elem_type for v in graph.input if "past" in v.name)


def edges(graph: onnx.GraphProto, rng: random.Random, count: int) -> list[tuple[onnx.NodeProto, int]]:
    every = [(node, slot) for node in graph.node for slot, name in enumerate(node.input) if name]
    return rng.sample(every, min(count, len(every)))


# --- the same meaning in other words ---


def swap_operands(graph: onnx.GraphProto, rng: random.Random) -> bool:
    for node in graph.node:
        if node.op_type in ("Mul", "Add", "And") and node.domain == "" and rng.random() < 0.5:
            node.input[0], node.input[1] = node.input[1], node.input[0]
    return True


def add_identities(graph: onnx.GraphProto, rng: random.Random) -> bool:
    for node, slot in edges(graph, rng, 12):
        insert(graph, node, slot, "Identity")
    return True


def add_cast_pairs(graph: onnx.GraphProto, rng: random.Random) -> bool:
    kind = element_type(graph)
    wider = TensorProto.DOUBLE if kind == TensorProto.FLOAT else TensorProto.FLOAT
    nodes = [node for node in graph.node if node.op_type == "MatMul"]
    for node in rng.sample(nodes, min(4, len(nodes))):
        insert(graph, node, 0, "Cast", to=wider)
        insert(graph, node, 0, "Cast", to=kind)
    return True


def reorder(graph: onnx.GraphProto, rng: random.Random) -> bool:
    """Any order in which values are made before they are read."""
    waiting = list(graph.node)
    made = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    order = []
    while waiting:
        ready = [node for node in waiting if all(name in made for name in node.input)]
        node = rng.choice(ready)
        waiting.remove(node)
        made.update(node.output)
        order.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
    del graph.node[:]
    graph.node.extend(copies)
    return True


def rename(graph: onnx.GraphProto, rng: random.Random) -> bool:
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)} | {""}
    names: dict[str, str] = {}
    for node in graph.node:
        node.name = f"n{rng.getrandbits(48)}"
        for part in (node.input, node.output):
            part[:] = [name if name in kept else names.setdefault(name, f"v{len(names)}") for name in part]
    del graph.value_info[:]
    return True


def constants_as_nodes(graph: onnx.GraphProto, rng: random.Random) -> bool:
    for item in [item for item in graph.initializer if np.prod(item.dims, initial=1) < 16]:
        if rng.random() < 0.7:
            node = helper.make_node("Constant", [], [item.name], value=item)
            graph.initializer.remove(item)
            graph.node.insert(0, node)
    return True


def constants_as_initializers(graph: onnx.GraphProto, rng: random.Random) -> bool:
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        if rng.random() < 0.7 and node.attribute[0].name == "value":
            tensor = onnx.TensorProto.FromString(node.attribute[0].t.SerializeToString())
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            graph.node.remove(node)
    return True


PRESERVING: tuple[Edit, ...] = (
    swap_operands,
    add_identities,
    add_cast_pairs,
    reorder,
    rename,
    constants_as_nodes,
    constants_as_initializers,
)


# --- another meaning ---


def anchors(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in ANCHORS]


def set_attribute(node: onnx.NodeProto, name: str, value: float | int) -> None:
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))


def bias_on_scores(graph: onnx.GraphProto, rng: random.Random) -> bool:
    node = rng.choice(anchors(graph))
    slot = {"Softmax": 0, "MultiHeadAttention": 5}.get(node.op_type)
    if slot is None:
        return False
    bias = np.linspace(-1, 1, 6).reshape(1, 6, 1, 1) * rng.choice([0.01, 0.3, 2.0])
    insert(graph, node, slot, "Add", weight(graph, bias.astype(FLOATS[element_type(graph)])))
    # A constant per head cancels in the softmax: make it depend on the key as well.
    tokens = weight(graph, np.array([rng.choice([0.9, 1.3])], FLOATS[element_type(graph)]))
    insert(graph, node, slot, "Mul", tokens)
    return True


def window(graph: onnx.GraphProto, rng: random.Random) -> bool:
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not nodes:
        return False
    set_attribute(rng.choice(nodes), "local_window_size", rng.randint(1, 200))
    return True


def soft_cap(graph: onnx.GraphProto, rng: random.Random) -> bool:
    node = rng.choice(anchors(graph))
    if node.op_type in ("GroupQueryAttention", "Attention"):
        set_attribute(node, "softcap", rng.uniform(1.0, 50.0))
    elif node.op_type == "Softmax":
        insert(graph, node, 0, "Tanh")
    else:
        return False
    return True


def other_length(graph: onnx.GraphProto, rng: random.Random) -> bool:
    """Shift what says how many keys there are, or where new ones go."""
    shift = rng.choice([-2, -1, 1])
    readers = {"GroupQueryAttention": 5, "TensorScatter": 2}
    nodes = [node for node in graph.node if node.op_type in readers]
    if not nodes:
        return False
    node = rng.choice(nodes)
    kind = np.int32 if node.op_type == "GroupQueryAttention" else np.int64
    insert(graph, node, readers[node.op_type], "Add", weight(graph, np.array([shift], kind)))
    return True


def mask_shifted(graph: onnx.GraphProto, rng: random.Random) -> bool:
    """Let a comparison of positions be off by some."""
    nodes = [n for n in graph.node if n.op_type in ("LessOrEqual", "Less", "GreaterOrEqual", "Greater")]
    if not nodes:
        return False
    insert(
        graph, rng.choice(nodes), rng.randint(0, 1), "Add", weight(graph, np.array(rng.choice([-3, -1, 2])))
    )
    return True


def not_causal(graph: onnx.GraphProto, rng: random.Random) -> bool:
    nodes = [n for n in graph.node if any(a.name == "is_causal" and a.i == 1 for a in n.attribute)]
    if not nodes:
        return False
    set_attribute(rng.choice(nodes), "is_causal", 0)
    return True


def other_cache_axis(graph: onnx.GraphProto, rng: random.Random) -> bool:
    pasts = {value.name for value in graph.input if "past" in value.name}
    joins = [n for n in graph.node if n.op_type in ("Concat", "TensorScatter") and pasts & set(n.input)]
    if not joins:
        return False
    set_attribute(rng.choice(joins), "axis", rng.choice([0, 1, 3]))
    return True


def new_rows_first(graph: onnx.GraphProto, rng: random.Random) -> bool:
    pasts = {value.name for value in graph.input if "past" in value.name}
    joins = [node for node in graph.node if node.op_type == "Concat" and pasts & set(node.input)]
    if not joins:
        return False
    node = rng.choice(joins)
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return True


def caches_of_other_layers(graph: onnx.GraphProto, rng: random.Random) -> bool:
    """Two layers read each other's past, and give presents of their own."""
    kind = rng.choice(["key", "value"])
    names = {f"past_key_values.{i}.{kind}": f"past_key_values.{1 - i}.{kind}" for i in (0, 1)}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return True


def keys_and_values_exchanged(graph: onnx.GraphProto, rng: random.Random) -> bool:
    layer = rng.randint(0, 1)
    a, b = (f"past_key_values.{layer}.{kind}" for kind in ("key", "value"))
    for node in graph.node:
        node.input[:] = [b if name == a else a if name == b else name for name in node.input]
    return True


def query_heads_in_other_order(graph: onnx.GraphProto, rng: random.Random) -> bool:
    """Move heads round between query and attention; keys are not moved along."""
    nodes = [node for node in graph.node if node.op_type == "Expand" and "repeat" not in node.name]
    nodes = [
        node for node in nodes if any(f"layers.{i}" in node.name for i in (0, 1)) and "attn" in node.name
    ]
    if not nodes:
        return False
    node = rng.choice(nodes)
    reader = next((n for n in graph.node if node.output[0] in n.input and n.op_type == "Reshape"), None)
    if reader is None:
        return False
    insert(graph, reader, 0, "Transpose", perm=[0, 2, 1, 3, 4])
    return True


CHANGING: tuple[Edit, ...] = (
    bias_on_scores,
    window,
    soft_cap,
    other_length,
    mask_shifted,
    not_causal,
    other_cache_axis,
    new_rows_first,
    caches_of_other_layers,
    keys_and_values_exchanged,
    query_heads_in_other_order,
)
