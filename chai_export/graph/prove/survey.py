"""Every attention of a graph with its mask proven: what a rewrite and an explanation start from."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from chai_export.graph.match.caches import Finding
from chai_export.graph.match.find import Survey, locate
from chai_export.graph.match.miss import Reached, Refusal
from chai_export.graph.match.roles import Roles
from chai_export.graph.match.site import AttentionSite
from chai_export.graph.prove.mask import MaskError, MaskProver
from chai_export.graph.read.quiet import quiet_onnx_ir


@quiet_onnx_ir()
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
    sites = tuple(
        replace(site, scale=first.scale, terms=first.terms, chunks=first.chunks) for site, first in pairs
    )
    return Survey(sites, found.roles, known.longest_past)


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
            checked.append(Refusal(finding.anchor, None, str(error), Reached.MASK, finding.layer))
            continue
        if isinstance(finding, Refusal):
            checked.append(finding)
            continue
        longest.append(proof.longest_past)
        terms = replace(
            finding.terms,
            window=proof.window or finding.terms.window,
            softcap=proof.softcap or finding.terms.softcap,
            sinks=finding.terms.sinks if proof.sinks is None else proof.sinks,
            slopes=proof.slopes,
        )
        scale = finding.scale * proof.scale
        checked.append(replace(finding, scale=scale, terms=terms, chunks=proof.chunks))
    return Survey(tuple(checked), roles, min(longest, default=0))
