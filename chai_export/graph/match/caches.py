"""Whose cache an attention reads, and whether it comes back as what callers take it for."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

import onnx_ir as ir

from chai_export.graph.match.miss import Reached, Refusal
from chai_export.graph.match.site import AttentionSite

Finding = AttentionSite | Refusal

_NUMBER = re.compile(r"\d+")


def with_source_layers(findings: list[Finding]) -> list[Finding]:
    """Name the earlier layer of sites that read its keys, values and cache; refuse those that read half."""
    owner: dict[ir.Value, AttentionSite] = {}
    return [
        finding if isinstance(finding, Refusal) else _with_source_layer(finding, owner)
        for finding in findings
    ]


def _with_source_layer(site: AttentionSite, owner: dict[ir.Value, AttentionSite]) -> Finding:
    """``site`` as the ``owner`` of its caches, or with the layer that owns them, or refused."""
    caches = (site.key.past, site.value.past)
    if caches[0] is caches[1]:
        reason = "keys and values lie in one cache, a form not supported yet"
        return Refusal(site.anchor, None, reason, Reached.RETURN, site.layer)
    first = next((owner[cache] for cache in caches if cache in owner), None)
    if first is None:
        owner.update(dict.fromkeys(caches, site))
        return site
    if _reads_cache_of(site, first):
        return replace(site, source_layer=first.layer)
    reason = f"it reads the cache of layer {first.layer}, but not that layer's keys and values with it"
    return Refusal(site.anchor, None, reason, Reached.RETURN, site.layer)


def _reads_cache_of(site: AttentionSite, first: AttentionSite) -> bool:
    """Whether keys and values, cached and new, are those of ``first``. A factor on the keys is its own."""
    pairs = ((site.key, first.key), (site.value, first.value))
    return all(
        mine.past is theirs.past and mine.new is theirs.new and mine.present is theirs.present
        for mine, theirs in pairs
    )


def with_matching_caches(findings: list[Finding], outputs: Collection[ir.Value]) -> list[Finding]:
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
            return Refusal(site.anchor, None, reason, Reached.RETURN, site.layer)
    return site
