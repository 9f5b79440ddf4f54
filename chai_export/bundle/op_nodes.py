"""The op nodes of a bundle's graph against its manifest, which says what they are, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import onnx

from chai_export.bundle.graph_io import past_key, present_key
from chai_export.errors import ChaiError, reason
from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.op.schema import DOMAIN, OP_TYPE, SHARED_OP_TYPE, signature

if TYPE_CHECKING:
    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Manifest

_AGAIN = "export or rewrite again"


def op_counts(nodes: Iterable[Any]) -> dict[str, int]:
    """How many nodes there are of each operator, e.g. {"MatMul": 14, "chai::ClusteredHeadAttention": 2}.

    Operators outside the default domain carry it as a prefix. The nodes are those of onnx or of onnx_ir.
    """
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    return dict(sorted(Counter(names).items()))


def bundle_op_counts(bundle: Bundle) -> dict[str, int]:
    """Those of a bundle's main graph, without onnx_ir, which takes longer to import than the rest together.

    Raises:
        ChaiError: the graph cannot be read.
    """
    return op_counts(_graph_of(bundle).graph.node)


def _graph_of(bundle: Bundle) -> onnx.ModelProto:
    try:
        return onnx.load(str(bundle.model_path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no types
        raise ChaiError(f"{bundle.model_path} cannot be read ({reason(error)}); {_AGAIN}") from error


def check_op_nodes(bundle: Bundle) -> None:
    """Compare the numbers and attributes of the op nodes with the manifest; no weights are read.

    A runner that feeds fewer tokens at first than the graph's probe has, or expects maps that the graph does
    not decide, would give another text and no error.

    Raises:
        ChaiError: they differ, or the graph cannot be read.
    """
    manifest = bundle.manifest
    model = _graph_of(bundle)

    def differs(what: str, found: object, wanted: object) -> ChaiError:
        return ChaiError(
            f"{bundle.model_path} does not fit its manifest: {what} is {found} and should be {wanted}; "
            + _AGAIN
        )

    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    caches = len(manifest.cache_layers)
    for op_type, wanted in ((OP_TYPE, caches), (SHARED_OP_TYPE, manifest.num_layers - caches)):
        found = sum(node.op_type == op_type for node in nodes)
        if found != wanted:
            raise ChaiError(
                f"{bundle.model_path} does not fit its manifest: it has {found} {op_type} nodes and should "
                f"have {wanted}; {_AGAIN}"
            )
    version = next((each.version for each in model.opset_import if each.domain == DOMAIN), None)
    if version != manifest.op_version:
        raise differs("the op's version", version, manifest.op_version)
    for node in nodes:
        stated = {attribute.name: attribute.i for attribute in node.attribute}
        for name, default, value in _wanted(manifest, node):
            if stated.get(name, default) != value:
                raise differs(f"{name} of node {node.name!r}", stated.get(name, default), value)


def _wanted(manifest: Manifest, node: onnx.NodeProto) -> list[tuple[str, int, int]]:
    """Name, default and what the manifest says of the attributes of a node."""
    storage = manifest.storage
    layer = _layer(manifest, node)
    return [
        ("probe_tokens", PAPER_PROBE_TOKENS, manifest.probe_tokens),
        ("online", 1, int(manifest.static is None)),
        ("key_bits", 0, storage.key_bits[layer]),
        ("value_bits", 0, storage.value_bits[layer]),
        ("group", DEFAULT_GROUP, storage.group),
        ("window", 0, manifest.window(layer)),
    ]


def _layer(manifest: Manifest, node: onnx.NodeProto) -> int:
    """The layer whose cache a node reads; its storage is that of the layers that share it.

    Raises:
        ChaiError: it reads no cache of the graph.
    """
    names = {name(layer): layer for layer in manifest.cache_layers for name in (past_key, present_key)}
    place = signature(node.op_type).input_names.index("key_cache")
    name = node.input[place] if place < len(node.input) else ""
    if name not in names:
        raise ChaiError(
            f"node {node.name!r} reads {name or 'nothing'!r} instead of a layer's cache; {_AGAIN}"
        )
    return names[name]
