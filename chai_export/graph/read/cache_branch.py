"""Merged decoders: one graph for calls with and without a past, chosen by an If on ``use_cache_branch``.

Both branches are the same model; the one with a past computes the other with a past of no tokens, which the
proofs of masks and attentions check. So it takes the If's place, and what the other branch would say of an
empty cache is not asked for.
"""

from __future__ import annotations

import onnx_ir as ir

from chai_export.errors import ChaiError

_FLAG = "use_cache_branch"
_PASSED = frozenset({"Identity", "Cast", "Squeeze", "Reshape", "Unsqueeze"})


def choose_cache_branch(model: ir.Model) -> None:
    """Put the branch with a past in the place of every If on ``use_cache_branch``, in place.

    Raises:
        ChaiError: attention stands in a branch of another If, Loop or Scan.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "If" and node.domain == "" and _asks_for_cache(node.inputs[0]):
            _detach(node.attributes["else_branch"].as_graph())
            _inline(graph, node, node.attributes["then_branch"].as_graph())
    for node in graph:
        inner = next((item for body in _bodies(node) for item in body if _is_attention(item)), None)
        if inner is not None:
            raise ChaiError(
                f"attention {inner.name!r} stands inside node {node.name!r} ({node.op_type}); export the "
                "model as one graph without branches: `optimum-cli export onnx --model MODEL --task "
                "text-generation-with-past DIR` with a current optimum, or `chai-export export MODEL`"
            )


def _asks_for_cache(value: ir.Value | None) -> bool:
    while value is not None and not value.is_graph_input():
        node = value.producer()
        if node is None or node.op_type not in _PASSED:
            return False
        value = node.inputs[0]
    return value is not None and value.name == _FLAG


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    """Move a branch's nodes and initializers before ``node`` and let them stand for its outputs."""
    for value in list(branch.initializers.values()):
        del branch.initializers[str(value.name)]
        value.name = f"{node.name}/{value.name}"
        graph.register_initializer(value)
    results = list(branch.outputs)
    branch.outputs.clear()
    inner = list(branch)
    branch.remove(inner)
    graph.insert_before(node, inner)
    for old, new in zip(node.outputs, results, strict=True):
        new.name, old.name = old.name, f"{old.name}/of_branch"
        new.type, new.shape = old.type or new.type, old.shape or new.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _detach(branch: ir.Graph) -> None:
    """Let a branch that falls away read nothing of the graph around it."""
    for node in branch.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _bodies(node: ir.Node) -> list[ir.Graph]:
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return graphs + [inner for graph in graphs for item in graph for inner in _bodies(item)]


def _is_attention(node: ir.Node) -> bool:
    return node.op_type in ("Softmax", "Attention", "GroupQueryAttention", "MultiHeadAttention")
