"""The steps of a rewrite in order: read, find, prove each attention, transform, write, prove the whole."""

from __future__ import annotations

from pathlib import Path

from chai_export.bundle.bundle import MODEL_FILE
from chai_export.bundle.manifest import Manifest, Proof, RopeRecord
from chai_export.clustering.plan import Chosen, every_head
from chai_export.errors import ChaiError
from chai_export.graph.explain.estimate import estimate
from chai_export.graph.match.find import require_sites
from chai_export.graph.match.miss import DYNAMIC
from chai_export.graph.prove.attentions import TOLERANCE, SiteProver
from chai_export.graph.prove.exact_activations import quantises_activations
from chai_export.graph.prove.rows import prove_rows
from chai_export.graph.prove.survey import survey, survey_again
from chai_export.graph.prove.whole_model import RELATIVE_TOLERANCE, prove_model
from chai_export.graph.read.load import load_graph, read_model
from chai_export.graph.read.quiet import quiet_onnx_ir
from chai_export.graph.rewrite.cleanup import check_result
from chai_export.graph.rewrite.draft import draft_manifest, require_opset
from chai_export.graph.rewrite.equalise import equalisers
from chai_export.graph.rewrite.position_limit import position_limit
from chai_export.graph.rewrite.rope_switch import find_switches
from chai_export.graph.rewrite.transform import transform
from chai_export.graph.rewrite.weights import write_model
from chai_export.op.precision import EXACT, Precision
from chai_export.progress import note

_LARGE = 10**9
"""Bytes of weights from which on the estimate is printed."""


@quiet_onnx_ir()
def rewrite_model(
    path: Path,
    clusters: Chosen | None,
    directory: Path,
    probe_tokens: int,
    *,
    precision: Precision = EXACT,
    take: bool = False,
) -> Manifest:
    """Rewrite ``path`` into ``directory``/model.onnx with its weights; return a manifest of what was found.

    The source is read twice: to be transformed, and to be compared with. Neither holds its weights.
    ``clusters`` None keeps every head. ``precision`` is what caches are stored in. ``take``: the source's
    data file may be moved into the bundle.

    Raises:
        ChaiError: the file is damaged or cannot be rewritten, clusters do not fit it, or a proof fails.
    """
    source = load_graph(path)
    require_opset(path, source)
    needs = estimate(source, path)
    if needs.weight_bytes >= _LARGE:
        note(f"rewrite: {needs.describe()}")
    found = survey(source)
    sites = require_sites(found)
    roles = found.roles
    assert roles is not None
    one_row = f"{path} takes 1 row in each call"
    if roles.batch is not None and not needs.whole_model:
        raise ChaiError(
            f"{one_row}, and whether it can take more is seen on the whole model, which is too large to be "
            f"run here; {DYNAMIC}"
        )
    draft = draft_manifest(path, source, sites, probe_tokens, precision)
    clusters = clusters or every_head(draft.head_counts)
    clusters.check(draft.head_counts)
    prover = SiteProver(source.graph, roles, probe_tokens)
    prover.prove(sites)

    target = load_graph(path)
    again = survey_again(target, found)
    assert again.roles is not None
    switches = find_switches(target.graph, again.roles)
    lengths = sorted({switch.length for switch in switches})
    draft = draft.model_copy(update={"rope": RopeRecord(switch_lengths=lengths) if lengths else None})
    divided = equalisers(clusters, draft)
    transform(target, again.sites, again.roles, draft, switches, divided)
    check_result(target, draft.io)
    limit = position_limit(target.graph)
    prove_rows(target.graph, again.roles, limit)
    how = write_model(target, source, directory, take=take)
    stored = ", caches stored exactly" if draft.storage.rounds else ""
    attentions = f"{len(sites)} attentions cut out of the source (max difference {prover.max_abs_diff:.2g})"
    if needs.whole_model:
        exact = ", activations exact" if quantises_activations(source.graph) else ""
        try:
            whole = prove_model(source, roles, sites, read_model(directory / MODEL_FILE), draft, divided)
        except ChaiError as error:
            if roles.batch is None:
                raise
            raise ChaiError(f"{one_row}, and cannot be made to take more; {DYNAMIC}") from error
        compared = (
            f"{attentions} and the whole model's logits and caches, all heads kept, in float32{exact}{stored}"
        )
        proof = Proof(compared=f"{compared}; weights {how}", max_abs_diff=whole, tolerance=RELATIVE_TOLERANCE)
    else:
        compared = (
            f"{attentions}, all heads kept, in float32{stored}; the whole model was too large to be compared"
        )
        proof = Proof(
            compared=f"{compared}; weights {how}", max_abs_diff=prover.max_abs_diff, tolerance=TOLERANCE
        )
    return draft.model_copy(
        update={"kept_heads": list(clusters.kept_heads), "max_positions": limit, "proof": proof}
    )
