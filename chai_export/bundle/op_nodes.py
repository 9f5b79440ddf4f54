"""The op nodes of a bundle's graph against its manifest, which says what they are, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from chai_export.errors import ChaiError, reason
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.op.schema import DOMAIN, OP_TYPE, SHARED_OP_TYPE

if TYPE_CHECKING:
    from chai_export.bundle.bundle import Bundle

_AGAIN = "export or rewrite again"


def check_op_nodes(bundle: Bundle) -> None:
    """Compare the numbers and attributes of the op nodes with the manifest; no weights are read.

    A runner that feeds fewer tokens at first than the graph's probe has, or expects maps that the graph does
    not decide, would give another text and no error.

    Raises:
        ChaiError: they differ, or the graph cannot be read.
    """
    manifest = bundle.manifest
    try:
        graph = onnx.load(str(bundle.model_path), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError has no types
        raise ChaiError(f"{bundle.model_path} cannot be read ({reason(error)}); {_AGAIN}") from error
    nodes = [node for node in graph.node if node.domain == DOMAIN]
    caches = len(manifest.cache_layers)
    for op_type, wanted in ((OP_TYPE, caches), (SHARED_OP_TYPE, manifest.num_layers - caches)):
        found = sum(node.op_type == op_type for node in nodes)
        if found != wanted:
            raise ChaiError(
                f"{bundle.model_path} does not fit its manifest: it has {found} {op_type} nodes and should "
                f"have {wanted}; {_AGAIN}"
            )
    online = int(manifest.static is None)
    for node in nodes:
        stated = {attribute.name: attribute.i for attribute in node.attribute}
        for name, default, wanted in (
            ("probe_tokens", PAPER_PROBE_TOKENS, manifest.probe_tokens),
            ("online", 1, online),
        ):
            found = stated.get(name, default)
            if found != wanted:
                raise ChaiError(
                    f"{bundle.model_path} does not fit its manifest: {name} of node {node.name!r} is {found} "
                    f"and should be {wanted}; {_AGAIN}"
                )
