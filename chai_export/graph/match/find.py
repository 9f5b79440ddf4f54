"""Run every matcher over a graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.match import attention_op, group_query, multi_head, softmax, unsupported
from chai_export.graph.match.caches import Finding, with_matching_caches, with_source_layers
from chai_export.graph.match.miss import NoMatch, Refusal
from chai_export.graph.match.roles import Roles, find_roles, require_free_sizes
from chai_export.graph.match.site import AttentionSite

Matcher = tuple[Callable[[ir.Node], bool], Callable[[ir.Node, int], AttentionSite]]

MATCHERS: tuple[Matcher, ...] = (
    (attention_op.is_anchor, attention_op.match),
    (softmax.is_anchor, softmax.match),
    (group_query.is_anchor, group_query.match),
    (multi_head.is_anchor, multi_head.match),
    (unsupported.is_anchor, unsupported.match),
)
"""Anchor test and matcher of each form. A node is an anchor of at most one of them."""


@dataclass(frozen=True)
class Survey:
    """All anchors of a graph in order, with the roles of its inputs (None if nothing matched).

    ``longest_past`` is how far the masks were proven to be plain, in tokens.
    """

    findings: tuple[Finding, ...]
    roles: Roles | None
    longest_past: int = 0

    @property
    def sites(self) -> list[AttentionSite]:
        """What matched, by layer."""
        return [finding for finding in self.findings if isinstance(finding, AttentionSite)]

    @property
    def refusals(self) -> list[Refusal]:
        """What did not."""
        return [finding for finding in self.findings if isinstance(finding, Refusal)]


def locate(model: ir.Model) -> Survey:
    """Every attention of a normalised model as its matcher sees it, masks not looked at yet.

    Raises:
        ChaiError: an input of the graph is unknown, or its sizes are fixed.
    """
    graph = model.graph
    require_free_sizes(graph)
    opset = model.opset_imports.get("", 0)
    findings = [finding for node in graph if (finding := _match(node, opset)) is not None]
    findings = [replace(finding, layer=index) for index, finding in enumerate(findings)]
    findings = with_matching_caches(with_source_layers(findings), set(graph.outputs))
    sites = [finding for finding in findings if isinstance(finding, AttentionSite)]
    if not sites and not any(finding.chain for finding in findings):
        return Survey(tuple(findings), None)
    return Survey(tuple(findings), find_roles(graph, _caches(graph, sites), sites))


def require_sites(found: Survey) -> list[AttentionSite]:
    """The sites, if every anchor matched.

    Raises:
        ChaiError: nothing matched, or something was refused; names layer, node and reason.
    """
    if not found.findings:
        raise ChaiError(
            "no attention found: the graph has no Attention node and no Softmax between two MatMuls; "
            "export a decoder-only language model with past key/values (see `chai-export inspect`)"
        )
    if found.refusals:
        nearest = max(found.refusals, key=lambda refusal: (refusal.reached.depth, -(refusal.layer or 0)))
        first = found.refusals[0] if found.sites else nearest
        count = len(found.refusals)
        others = f" ({count} of {len(found.findings)} attentions refused)" if count > 1 else ""
        advice = first.advice or (
            "choose a model with plain causal attention and past key/values, or see "
            "`chai-export rewrite --explain`"
        )
        raise ChaiError(f"{first.where()}: {first.reason}{others}; {advice}")
    return found.sites


def _match(node: ir.Node, opset: int) -> Finding | None:
    for is_anchor, match in MATCHERS:
        if is_anchor(node):
            try:
                return match(node, opset)
            except NoMatch as miss:
                return Refusal(
                    node, miss.node, miss.reason, miss.reached, chain=miss.chain, advice=miss.advice
                )
    return None


_PAST_NAME = re.compile(r"past|cache", re.IGNORECASE)


def _caches(graph: ir.Graph, sites: list[AttentionSite]) -> list[ir.Value]:
    """Caches of the sites, and inputs named like caches (of attentions that were refused)."""
    own = [cache for site in sites for cache in (site.key.past, site.value.past)]
    named = [v for v in graph.inputs if v not in own and v.name and _PAST_NAME.search(v.name)]
    return own + [value for value in named if value.shape is not None and len(value.shape) == 4]
