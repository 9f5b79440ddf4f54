"""Put a node of one of the ops in the place of each attention site and connect caches and maps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from chai_export.bundle.graph_io import (
    HEAD_MAP,
    LENGTHS,
    PAST_LENGTHS,
    PRESENT_HEAD_MAP,
    page_table,
    past_key,
    past_value,
    scales,
)
from chai_export.bundle.manifest import Manifest
from chai_export.clustering.equaliser import Equalisers
from chai_export.graph.match.site import AttentionSite
from chai_export.graph.read.builder import Builder
from chai_export.graph.rewrite.equalise import equalised
from chai_export.op.attributes import Attributes
from chai_export.op.function import Form
from chai_export.op.schema import DOMAIN, OP_TYPE, SHARED_OP_TYPE

_TO_TOKENS = [0, 2, 1, 3]


def replace_sites(
    builder: Builder,
    sites: list[AttentionSite],
    inputs: dict[str, ir.Value],
    draft: Manifest,
    equalisers: Equalisers,
) -> list[ir.Value]:
    """Replace every site's output; return the new graph outputs that follow the logits.

    A site that reads an earlier layer's cache becomes a SharedClusteredHeadAttention, with that one's
    equaliser.

    Returns:
        present_head_map int32 [L,B,H], then the caches of each layer that has some, as ``draft.io`` has them.
    """
    nodes: list[ir.Node] = []
    for site in sites:
        i = site.layer
        past_map = builder.op("Gather", inputs[HEAD_MAP], builder.integer(i), axis=0, name=f"head_map.{i}")
        factors = equalisers.get(i if site.source_layer is None else site.source_layer)
        products = (site.query, site.key.new) if factors is None else equalised(builder, site, factors)
        query, key, value = (_of_cache_type(builder, site, each) for each in (*products, site.value.new))
        new = (query, key, value)
        if site.source_layer is None:
            node = _own(builder, site, new, inputs, past_map, draft)
        else:
            node = _shared(builder, site, new, nodes[site.source_layer], inputs, past_map, draft)
        nodes.append(node)
        attended = node.outputs[0]
        attended.type = ir.TensorType(site.key.past.dtype or ir.DataType.FLOAT)
        _connect(builder, site, attended)
    made = {value.name: value for node in nodes for value in node.outputs}
    caches = [made[cache.present.name] for cache in draft.io.caches]
    maps = [builder.op("Unsqueeze", node.outputs[-1], builder.integers(0)) for node in nodes]
    head_map = builder.op("Concat", *maps, axis=0, name=PRESENT_HEAD_MAP)
    head_map.type, head_map.shape = inputs[HEAD_MAP].type, inputs[HEAD_MAP].shape
    return [head_map, *caches]


def _of_cache_type(builder: Builder, site: AttentionSite, value: ir.Value) -> ir.Value:
    """The op computes in one type: GPT-J and CodeGen widen queries and keys of 16 bits for the scores."""
    dtype = site.key.past.dtype
    if dtype is None or value.dtype in (None, dtype):
        return value
    cast = builder.op("Cast", value, to=dtype)
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    return cast


def _own(
    builder: Builder,
    site: AttentionSite,
    new: tuple[ir.Value, ir.Value, ir.Value],
    inputs: dict[str, ir.Value],
    past_map: ir.Value,
    draft: Manifest,
) -> ir.Node:
    """A node with a cache; ``new`` are query, key and value."""
    i = site.layer
    caches = {cache.past.name: cache.present.name for cache in draft.io.caches if cache.layer == i}
    names = [past_key(i), past_value(i), scales(past_key(i)), scales(past_value(i))]
    pasts = [inputs[name] if name in caches else None for name in names]
    node = _node(
        builder,
        site,
        OP_TYPE,
        (*new, *pasts, inputs[page_table(draft.window(i))], past_map),
        (f"attention.{i}", *(caches.get(name, "") for name in names), f"present_head_map.{i}"),
        inputs,
        draft,
    )
    for present, past in zip(node.outputs[1:-1], pasts, strict=True):
        if past is not None:
            present.type = past.type
            present.shape = past.shape.copy() if past.shape is not None else None
    return node


def _shared(
    builder: Builder,
    site: AttentionSite,
    new: tuple[ir.Value, ir.Value, ir.Value],
    producer: ir.Node,
    inputs: dict[str, ir.Value],
    past_map: ir.Value,
    draft: Manifest,
) -> ir.Node:
    """A node that reads what ``producer`` gives."""
    i = site.layer
    caches = [value if value.name else None for value in producer.outputs[1:-1]]
    return _node(
        builder,
        site,
        SHARED_OP_TYPE,
        (*new, *caches, inputs[page_table(draft.window(i))], producer.outputs[-1], past_map),
        (f"attention.{i}", f"present_head_map.{i}"),
        inputs,
        draft,
    )


def _node(
    builder: Builder,
    site: AttentionSite,
    op_type: str,
    inputs: tuple[ir.Value | None, ...],
    outputs: tuple[str, ...],
    graph_inputs: dict[str, ir.Value],
    draft: Manifest,
) -> ir.Node:
    storage, i = draft.storage, site.layer
    attributes = Attributes(
        float(site.scale),
        draft.probe_tokens,
        key_bits=storage.key_bits[i],
        value_bits=storage.value_bits[i],
        group=storage.group,
        window=site.terms.window,
        softcap=site.terms.softcap,
    )
    first = builder.op(
        op_type,
        *inputs,
        graph_inputs[PAST_LENGTHS],
        graph_inputs[LENGTHS],
        *_of_heads(builder, site),
        domain=DOMAIN,
        name=f"attention.{i}",
        outputs=outputs,
        overload=Form.of(
            attributes, sinks=site.terms.sinks is not None, slopes=site.terms.slopes is not None
        ).overload,
        **attributes.as_onnx(),
    )
    node = first.producer()
    assert node is not None
    return node


def _of_heads(builder: Builder, site: AttentionSite) -> list[ir.Value | None]:
    """Sinks and slopes, None for absent ones that are not the last."""
    i, terms, dtype = site.layer, site.terms, site.key.past.dtype or ir.DataType.FLOAT
    values: list[ir.Value | None] = [None, None]
    if terms.sinks is not None:
        values[0] = builder.constant(np.array(terms.sinks, dtype.numpy()), f"sinks.{i}")
    if terms.slopes is not None:
        values[1] = builder.constant(np.array(terms.slopes, np.float32), f"alibi_slopes.{i}")
    while values and values[-1] is None:
        values.pop()
    return values


def _connect(builder: Builder, site: AttentionSite, attended: ir.Value) -> None:
    """Let the readers of the site's output [B,H,S,Dv] read the op's [B,S,H*Dv] instead.

    Exporters move the heads back with Transpose and Reshape, which the op has done already.
    """
    width = site.heads.num_query_heads * site.heads.value_head_dim
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
        by_head = builder.integers(0, 0, site.heads.num_query_heads, site.heads.value_head_dim)
        split = builder.op("Reshape", attended, by_head)
        ir.convenience.replace_all_uses_with(site.output, builder.op("Transpose", split, perm=_TO_TOKENS))


def _is_reshape_of(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type == "Reshape" and node.domain == "" and node.inputs[0] is value


def _is_by_token(value: ir.Value, width: int) -> bool:
    """Whether a reshaped output is [B, S, H*Dv]: rank 3 with that last dim, which fixes the other two."""
    return value.shape is not None and len(value.shape) == 3 and value.shape[2] == width
