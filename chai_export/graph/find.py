"""Run every matcher over a graph and prove the masks of what they find."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph import match_attention_op, match_group_query, match_multi_head, match_softmax
from chai_export.graph.mask import MaskError, MaskProver
from chai_export.graph.roles import Roles, find_roles
from chai_export.graph.site import AttentionSite, NoMatch, Refusal

Matcher = tuple[Callable[[ir.Node], bool], Callable[[ir.Node, int], AttentionSite]]

MATCHERS: tuple[Matcher, ...] = (
    (match_attention_op.is_anchor, match_attention_op.match),
    (match_softmax.is_anchor, match_softmax.match),
    (match_group_query.is_anchor, match_group_query.match),
    (match_multi_head.is_anchor, match_multi_head.match),
)
"""Anchor test and matcher of each form. A node is an anchor of at most one of them."""

Finding = AttentionSite | Refusal


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


def survey(model: ir.Model) -> Survey:
    """Find and check every attention of a normalised model; the model is not changed.

    Raises:
        ChaiError: an input of the graph is unknown.
    """
    found = locate(model)
    return found if found.roles is None else _with_masks_proven(model.graph, found, found.roles)


def survey_again(model: ir.Model, known: Survey) -> Survey:
    """The survey of a second copy of a model, with what was proven of the first one's masks.

    Raises:
        ChaiError: as :func:`survey`.
    """
    found = locate(model)
    pairs = zip(found.sites, known.sites, strict=True)
    sites = tuple(replace(site, scale=first.scale, chunks=first.chunks) for site, first in pairs)
    return Survey(sites, found.roles, known.longest_past)


def locate(model: ir.Model) -> Survey:
    """Every attention of a normalised model as its matcher sees it, masks not looked at yet.

    Raises:
        ChaiError: an input of the graph is unknown.
    """
    graph = model.graph
    opset = model.opset_imports.get("", 0)
    findings = [finding for node in graph if (finding := _match(node, opset)) is not None]
    findings = [_with_layer(finding, index) for index, finding in enumerate(findings)]
    findings = _with_matching_caches(_with_source_layers(findings), set(graph.outputs))
    sites = [finding for finding in findings if isinstance(finding, AttentionSite)]
    if not sites and not any(finding.chain for finding in findings):
        return Survey(tuple(findings), None)
    return Survey(tuple(findings), find_roles(graph, _caches(graph, sites), sites))


def _with_masks_proven(graph: ir.Graph, found: Survey, roles: Roles) -> Survey:
    prover = MaskProver(graph, roles)
    checked: list[Finding] = []
    longest = []
    for finding in found.findings:
        chain = finding.chain
        if chain is None:
            checked.append(finding)
            continue
        try:
            proof = prover.prove(chain, finding if isinstance(finding, AttentionSite) else None)
        except MaskError as error:
            checked.append(Refusal(finding.anchor, None, str(error), 5, finding.layer))
            continue
        if isinstance(finding, Refusal):
            checked.append(finding)
            continue
        longest.append(proof.longest_past)
        checked.append(replace(finding, scale=finding.scale * proof.scale, chunks=proof.chunks))
    return Survey(tuple(checked), roles, min(longest, default=0))


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
        nearest = max(found.refusals, key=lambda refusal: (refusal.depth, -(refusal.layer or 0)))
        first = found.refusals[0] if found.sites else nearest
        count = len(found.refusals)
        others = f" ({count} of {len(found.findings)} attentions refused)" if count > 1 else ""
        raise ChaiError(
            f"{first.where()}: {first.reason}{others}; choose a model with plain causal attention and "
            "past key/values, or see `chai-export rewrite --explain`"
        )
    return found.sites


def _match(node: ir.Node, opset: int) -> Finding | None:
    for is_anchor, match in MATCHERS:
        if is_anchor(node):
            try:
                return match(node, opset)
            except NoMatch as miss:
                return Refusal(node, miss.node, miss.reason, miss.depth, chain=miss.chain)
    return None


def _with_layer(finding: Finding, index: int) -> Finding:
    return replace(finding, layer=index)


def _with_matching_caches(findings: list[Finding], outputs: Collection[ir.Value]) -> list[Finding]:
    """Refuse sites whose cache does not come back as the output of the same layer and kind.

    Callers give an output back as the input of its name (``present.3.key`` as ``past_key_values.3.key``),
    so a graph that returns a cache elsewhere means something else than an attention over its own cache.
    """
    return [
        finding if isinstance(finding, Refusal) else _checked_cache(finding, outputs) for finding in findings
    ]


def _checked_cache(site: AttentionSite, outputs: Collection[ir.Value]) -> Finding:
    for cache, what, other in ((site.key, "keys", "value"), (site.value, "values", "key")):
        past, present = str(cache.past.name), str(cache.present.name)
        reason = None
        if cache.present not in outputs:
            reason = f"the {what} written into cache {past} are no output of the graph"
        elif _NUMBER.findall(past) != _NUMBER.findall(present):
            reason = f"cache {past} comes back as {present}, the cache of another layer"
        elif other in past.rsplit(".", maxsplit=1)[-1] or other in present.rsplit(".", maxsplit=1)[-1]:
            reason = f"the {what} are cached in {past} and come back as {present}"
        if reason is not None:
            return Refusal(site.anchor, None, reason, 4, site.layer)
    return site


def _with_source_layers(findings: list[Finding]) -> list[Finding]:
    """Name the earlier layer of sites that read its keys, values and cache; refuse those that read half."""
    owner: dict[ir.Value, AttentionSite] = {}
    result: list[Finding] = []
    for finding in findings:
        if isinstance(finding, AttentionSite):
            caches = (finding.key.past, finding.value.past)
            first = next((owner[cache] for cache in caches if cache in owner), None)
            if caches[0] is caches[1]:
                reason = "keys and values lie in one cache, a form not supported yet"
                finding = Refusal(finding.anchor, None, reason, 4, finding.layer)  # noqa: PLW2901
            elif first is None:
                owner.update(dict.fromkeys(caches, finding))
            elif _reads_cache_of(finding, first):
                finding = replace(finding, source_layer=first.layer)  # noqa: PLW2901
            else:
                reason = (
                    f"it reads the cache of layer {first.layer}, but not that layer's keys and values with it"
                )
                finding = Refusal(finding.anchor, None, reason, 4, finding.layer)  # noqa: PLW2901
        result.append(finding)
    return result


def _reads_cache_of(site: AttentionSite, first: AttentionSite) -> bool:
    """Whether keys and values, cached and new, are those of ``first``. A factor on the keys is its own."""
    pairs = ((site.key, first.key), (site.value, first.value))
    return all(
        mine.past is theirs.past and mine.new is theirs.new and mine.present is theirs.present
        for mine, theirs in pairs
    )


_NUMBER = re.compile(r"\d+")
_PAST_NAME = re.compile(r"past|cache", re.IGNORECASE)


def _caches(graph: ir.Graph, sites: list[AttentionSite]) -> list[ir.Value]:
    """Caches of the sites, and inputs named like caches (of attentions that were refused)."""
    own = [cache for site in sites for cache in (site.key.past, site.value.past)]
    named = [v for v in graph.inputs if v not in own and v.name and _PAST_NAME.search(v.name)]
    return own + [value for value in named if value.shape is not None and len(value.shape) == 4]
