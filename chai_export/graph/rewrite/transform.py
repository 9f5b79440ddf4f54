"""The rewrite of one graph in memory: from an exported decoder to the graph of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import onnx_ir as ir

from chai_export.bundle.graph_io import LOGITS, OUTPUT_POSITIONS, ROPE_LENGTHS, GraphValue
from chai_export.bundle.manifest import Manifest
from chai_export.clustering.equaliser import Equalisers
from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles
from chai_export.graph.match.site import AttentionSite
from chai_export.graph.read.builder import Builder
from chai_export.graph.read.omitted_outputs import restore_omitted_outputs
from chai_export.graph.rewrite.bodies import add_bodies
from chai_export.graph.rewrite.cleanup import (
    drop_dead_nodes,
    replace_cache_shapes,
    replace_position_shapes,
    require_no_uses,
    state_shapes,
    tidy,
)
from chai_export.graph.rewrite.free_batch import free_batch
from chai_export.graph.rewrite.interface import make_inputs, token_positions
from chai_export.graph.rewrite.positions import replace_derived_positions
from chai_export.graph.rewrite.replace import replace_sites
from chai_export.graph.rewrite.rope_rows import choose_by_row, prove_edges
from chai_export.graph.rewrite.rope_switch import RopeSwitch
from chai_export.graph.rewrite.rotary_heads import state_rotary_heads
from chai_export.graph.rewrite.select_outputs import select_outputs
from chai_export.graph.rewrite.tied_head import read_tied_weights
from chai_export.op.schema import DOMAIN


def transform(
    model: ir.Model,
    sites: list[AttentionSite],
    roles: Roles,
    draft: Manifest,
    switches: Sequence[RopeSwitch] = (),
    equalisers: Equalisers = MappingProxyType({}),
) -> None:
    """Replace attention, caches, mask and positions of a normalised model, in place.

    Afterwards the graph is the one that ``draft`` describes and carries the bodies of its ops. ``switches``
    are the choices between rotary factors in it, made by row from here on; ``equalisers`` what keys are
    divided by before they are stored.

    Raises:
        ChaiError: old inputs are used for something the rewrite does not know, or a switch is not the same
            by row.
    """
    graph = model.graph
    builder = Builder(graph)
    io = draft.io
    if roles.batch is not None:
        free_batch(builder)
    inputs = make_inputs(roles.input_ids, io)
    logits = _logits(graph, sites)
    presents = replace_sites(builder, sites, inputs, draft, equalisers)
    selected = select_outputs(builder, logits, inputs[OUTPUT_POSITIONS], roles)
    graph.outputs.clear()
    graph.outputs.extend([selected, *presents])
    _describe_logits(selected, logits, io.logits)
    if roles.position_ids is not None:
        ir.convenience.replace_all_uses_with(roles.position_ids, token_positions(builder, inputs))
    drop_dead_nodes(model)
    replace_cache_shapes(builder, sites, roles.input_ids)
    replace_position_shapes(builder, roles.cache_position, roles.input_ids)
    drop_dead_nodes(model)
    chosen = [(s.length, choose_by_row(builder, roles, s, inputs[ROPE_LENGTHS])) for s in switches]
    graph.sort()
    drop_dead_nodes(model)
    if roles.position_ids is None:
        replace_derived_positions(builder, roles, token_positions(builder, inputs))
        drop_dead_nodes(model)
    for length, values in chosen:
        prove_edges(graph, roles, length, values)
    old = [value for value in graph.inputs if value is not roles.input_ids]
    require_no_uses(old)
    graph.inputs.clear()
    graph.inputs.extend(inputs.values())
    read_tied_weights(builder)
    add_bodies(model)
    model.opset_imports[DOMAIN] = draft.op_version
    graph.opset_imports[DOMAIN] = draft.op_version
    tidy(model)
    # Positions that the graph derived itself had one row for the whole batch; ours differ by row.
    state_shapes(model, forget=roles.position_ids is None)
    restore_omitted_outputs(model)
    state_rotary_heads(graph)


def _logits(graph: ir.Graph, sites: list[AttentionSite]) -> ir.Value:
    """The one output that is not a cache.

    Raises:
        ChaiError: there is none, or there are several.
    """
    presents = {id(cache.present) for site in sites for cache in (site.key, site.value)}
    rest = [value for value in graph.outputs if id(value) not in presents]
    named = [value for value in rest if value.name == LOGITS]
    if named:
        rest = named
    if len(rest) != 1:
        names = ", ".join(str(value.name) for value in rest) or "none"
        raise ChaiError(
            f"besides the caches the graph must have one output, the logits, and has {names}; "
            "export a causal language model with its head"
        )
    return rest[0]


def _describe_logits(selected: ir.Value, logits: ir.Value, wanted: GraphValue) -> None:
    selected.type = logits.type
    selected.shape = ir.Shape(list(wanted.dims))
    if selected is not logits:
        logits.name = f"{logits.name}_of_all_tokens"
    selected.name = wanted.name
