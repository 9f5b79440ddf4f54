"""What stands around a matched attention, in words: for people who check that the right things were found.

Nothing is decided here. Walking up from query and key to the projections, the nodes on the way tell which
rotary embedding and norm they went through; both stay in the graph as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from chai_export.graph.match.form import Form
from chai_export.graph.match.site import AttentionSite, CachedHeads
from chai_export.graph.read.constants import rank

_MOST_NODES = 400
_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "QLinearMatMul"})
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization")


@dataclass(frozen=True)
class Parts:
    """One phrase each; ``rope`` and ``norm`` are "none" where nothing was found."""

    attention: str
    mask: str
    rope: str
    norm: str
    cache: str
    weights: str


def describe_parts(site: AttentionSite) -> Parts:
    """Describe one site of a graph that :func:`~chai_export.graph.read.load.load_graph` has read."""
    query, key = _above(site.query), _above(site.key.new)
    return Parts(
        attention=f"{site.anchor.op_type} {site.anchor.name!r}, scale {site.scale:.6g}"
        + site.terms.describe(),
        mask=_mask(site),
        rope=_rope(site, query.nodes | key.nodes),
        norm=_norm(query.nodes | key.nodes),
        cache=_cache(site.key, site),
        weights=_weights(query.products, key.products),
    )


@dataclass(frozen=True)
class _Above:
    """The nodes between a value and the projections above it."""

    nodes: frozenset[ir.Node]
    products: tuple[ir.Node, ...]


def _above(value: ir.Value) -> _Above:
    nodes: dict[ir.Node, None] = {}
    products: dict[ir.Node, None] = {}
    stack: list[ir.Value | None] = [value]
    while stack and len(nodes) < _MOST_NODES:
        item = stack.pop()
        node = item.producer() if item is not None else None
        if node is None or node in nodes or node in products:
            continue
        if _is_projection(node):
            products[node] = None
        elif node.op_type != "Shape":  # sizes lead past the projections
            nodes[node] = None
            stack.extend(node.inputs)
    return _Above(frozenset(nodes), tuple(products))


def _is_projection(node: ir.Node) -> bool:
    """A product with a stored matrix; rotary frequencies meet positions in one too, but have three dims."""
    if node.op_type not in _PRODUCTS:
        return False
    if node.op_type == "MatMulNBits":
        return True
    return any(_stored(value) and rank(value) == 2 for value in node.inputs)


def _stored(value: ir.Value | None) -> bool:
    """An initializer, or what becomes of one through dequantisation and transposition."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "DequantizeLinear", "Cast"):
            return False
        value = node.inputs[0]
    return value is not None


def _mask(site: AttentionSite) -> str:
    chain = site.chain
    if chain.scores is not None:
        return "causal with padding, in the scores"
    if chain.mask is not None:
        return f"causal with padding, as input{' and is_causal' if chain.causal else ''}"
    return "causal, inside the operator"


def _rope(site: AttentionSite, nodes: frozenset[ir.Node]) -> str:
    if site.form is Form.G:
        return "inside the operator"
    for node in nodes:
        if node.op_type == "RotaryEmbedding":
            return f"{node.domain}.RotaryEmbedding" if node.domain else "RotaryEmbedding"
    # Every written-out rotation turns a half, or every other element, round with a Neg.
    return "written out" if any(node.op_type == "Neg" for node in nodes) else "none"


def _norm(nodes: frozenset[ir.Node]) -> str:
    kinds = {node.op_type for node in nodes}
    named = next((name for name in _NORMS if name in kinds), None)
    return named or ("written out" if "ReduceMean" in kinds else "none")


def _cache(key: CachedHeads, site: AttentionSite) -> str:
    how = "inside the operator"
    writer = key.present.producer()
    if writer is not None and writer is not site.anchor:
        # A scattered cache is moved back to [B,G,C,D] by a Transpose.
        source = writer.inputs[0].producer() if writer.op_type == "Transpose" and writer.inputs[0] else None
        how = "Concat on axis 2" if writer.op_type == "Concat" else (source or writer).op_type
    other = "" if site.source_layer is None else f", reads the cache of layer {site.source_layer}"
    return f"{key.past.name}, {how}{other}"


def _weights(query: tuple[ir.Node, ...], key: tuple[ir.Node, ...]) -> str:
    kinds = sorted({_product(node) for node in (*query, *key)})
    packed = bool(query) and query == key
    return f"{', '.join(kinds) or 'unknown'}{' for Q, K and V in one' if packed else ''}"


def _product(node: ir.Node) -> str:
    bits = node.attributes.get("bits") if node.op_type == "MatMulNBits" else None
    return node.op_type if bits is None else f"{node.op_type} {bits.as_int()} bits"
