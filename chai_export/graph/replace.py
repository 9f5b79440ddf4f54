"""Put a ClusteredHeadAttention node in the place of each attention site and connect caches and maps."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.build import Builder
from chai_export.graph.interface import Interface
from chai_export.graph.site import AttentionSite
from chai_export.op.schema import DOMAIN, OP_TYPE

_TO_TOKENS = [0, 2, 1, 3]


def replace_sites(
    builder: Builder, sites: list[AttentionSite], interface: Interface, probe_tokens: int
) -> list[ir.Value]:
    """Replace every site's output; return the new graph outputs that follow the logits.

    Returns:
        present_head_map int32 [L,B,H], then present_key.i and present_value.i of each layer.
    """
    maps: list[ir.Value] = []
    caches: list[ir.Value] = []
    for site in sites:
        i = site.layer
        past_map = builder.op("Gather", interface.head_map, builder.integer(i), axis=0, name=f"head_map.{i}")
        names = (f"attention.{i}", f"present_key.{i}", f"present_value.{i}", f"present_head_map.{i}")
        attended = builder.op(
            OP_TYPE,
            site.query,
            site.key.new,
            site.value.new,
            interface.past_keys[i],
            interface.past_values[i],
            past_map,
            interface.past_lengths,
            interface.lengths,
            domain=DOMAIN,
            name=f"attention.{i}",
            outputs=names,
            scale=float(site.scale),
            probe_tokens=probe_tokens,
            online=1,
        )
        node = attended.producer()
        assert node is not None
        _, present_key, present_value, present_map = node.outputs
        for present, past in (
            (present_key, interface.past_keys[i]),
            (present_value, interface.past_values[i]),
        ):
            present.type = past.type
            present.shape = past.shape.copy() if past.shape is not None else None
        attended.type = interface.past_keys[i].type
        caches += [present_key, present_value]
        maps.append(builder.op("Unsqueeze", present_map, builder.integers(0)))
        _connect(builder, site, attended)
    head_map = builder.op("Concat", *maps, axis=0, name="present_head_map")
    head_map.type, head_map.shape = interface.head_map.type, interface.head_map.shape
    return [head_map, *caches]


def _connect(builder: Builder, site: AttentionSite, attended: ir.Value) -> None:
    """Let the readers of the site's output [B,H,S,Dv] read the op's [B,S,H*Dv] instead.

    Exporters move the heads back with Transpose and Reshape, which the op has done already.
    """
    width = site.num_query_heads * site.value_head_dim
    for node in list(site.output.consumers()):
        perm = node.attributes.get("perm")
        if node.op_type != "Transpose" or perm is None or list(perm.as_ints()) != _TO_TOKENS:
            continue
        moved = node.outputs[0]
        readers = list(moved.consumers())
        if moved.is_graph_output() or not all(_is_reshape_of(reader, moved) for reader in readers):
            continue
        for reader in readers:
            reshaped = reader.outputs[0]
            if _is_by_token(reshaped, width) and not reshaped.is_graph_output():
                ir.convenience.replace_all_uses_with(reshaped, attended)
            else:
                reader.replace_input_with(0, attended)
    if site.output.uses():
        by_head = builder.integers(0, 0, site.num_query_heads, site.value_head_dim)
        split = builder.op("Reshape", attended, by_head)
        ir.convenience.replace_all_uses_with(site.output, builder.op("Transpose", split, perm=_TO_TOKENS))


def _is_reshape_of(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type == "Reshape" and node.domain == "" and node.inputs[0] is value


def _is_by_token(value: ir.Value, width: int) -> bool:
    """Whether a reshaped output is [B, S, H*Dv]: rank 3 with that last dim, which fixes the other two."""
    return value.shape is not None and len(value.shape) == 3 and value.shape[2] == width
