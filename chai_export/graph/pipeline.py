"""The steps of a rewrite in order: read, find, prove each attention, transform, write, prove the whole."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from chai_export.bundle.bundle import MODEL_FILE
from chai_export.bundle.manifest import Dtype, Manifest, Proof, Source
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph.cleanup import check_result
from chai_export.graph.estimate import estimate
from chai_export.graph.find import require_sites, survey, survey_again
from chai_export.graph.load import load_graph, read_model
from chai_export.graph.positions import position_limit
from chai_export.graph.prove_model import RELATIVE_TOLERANCE, prove_model
from chai_export.graph.prove_sites import TOLERANCE, SiteProver
from chai_export.graph.site import AttentionSite, kv_sources
from chai_export.graph.transform import transform
from chai_export.graph.weights import write_model
from chai_export.op.function import MIN_OPSET
from chai_export.op.schema import VERSION
from chai_export.progress import note

_LARGE = 10**9
"""Bytes of weights from which on the estimate is printed."""

_DTYPES: dict[ir.DataType | None, Dtype] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def rewrite_model(
    path: Path, clusters: Clusters, directory: Path, probe_tokens: int, *, take: bool = False
) -> Manifest:
    """Rewrite ``path`` into ``directory``/model.onnx with its weights; return a manifest of what was found.

    The source is read twice: to be transformed, and to be compared with. Neither holds its weights.
    ``take``: the source's data file may be moved into the bundle.

    Raises:
        ChaiError: the file is damaged or cannot be rewritten, clusters do not fit it, or a proof fails.
    """
    source = load_graph(path)
    opset = source.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ChaiError(f"{path} uses opset {opset}; export it again with opset {MIN_OPSET} or newer")
    needs = estimate(source)
    if needs.weight_bytes >= _LARGE:
        note(f"rewrite: {needs.describe()}")
    found = survey(source)
    sites = require_sites(found)
    roles = found.roles
    assert roles is not None
    shape = _common_geometry(sites)
    draft = Manifest(
        op_version=VERSION,
        dtype=_dtype(sites),
        num_layers=len(sites),
        num_query_heads=shape.num_query_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        value_head_dim=shape.value_head_dim,
        vocab_size=_vocabulary(source),
        kept_heads=[shape.num_kv_heads] * len(sites),
        kv_source_layers=kv_sources(sites),
        probe_tokens=probe_tokens,
        opset=opset,
        source=Source(kind="onnx", name=path.name),
        created_with=_created_with(),
    )
    clusters.check(draft)
    prover = SiteProver(source.graph, roles, probe_tokens)
    prover.prove(sites)

    target = load_graph(path)
    again = survey_again(target, found)
    assert again.roles is not None
    transform(target, again.sites, again.roles, probe_tokens)
    check_result(target)
    limit = position_limit(target.graph)
    how = write_model(target, source, directory, take=take)
    attentions = f"{len(sites)} attentions cut out of the source (max difference {prover.max_abs_diff:.2g})"
    if needs.whole_model:
        # Unless the weights were written anew, both graphs read the bundle's file from here on.
        beside = path.parent if how == "written" else directory
        whole = prove_model(source, beside, roles, sites, read_model(directory / MODEL_FILE), directory)
        compared = f"{attentions} and the whole model's logits and caches, all heads kept, in float32"
        proof = Proof(compared=f"{compared}; weights {how}", max_abs_diff=whole, tolerance=RELATIVE_TOLERANCE)
    else:
        compared = f"{attentions}, all heads kept, in float32; the whole model was too large to be compared"
        proof = Proof(
            compared=f"{compared}; weights {how}", max_abs_diff=prover.max_abs_diff, tolerance=TOLERANCE
        )
    return draft.model_copy(
        update={"kept_heads": list(clusters.kept_heads), "max_positions": limit, "proof": proof}
    )


def _common_geometry(sites: list[AttentionSite]) -> AttentionSite:
    """The sizes that all layers share.

    Raises:
        ChaiError: a layer has other sizes than the first.
    """
    first = sites[0]
    names = ("num_query_heads", "num_kv_heads", "head_dim", "value_head_dim")
    for site in sites:
        different = [name for name in names if getattr(site, name) != getattr(first, name)]
        if different:
            name = different[0]
            raise ChaiError(
                f"layer {site.layer} has {name} {getattr(site, name)}, layer 0 has {getattr(first, name)}; "
                "choose a model whose layers have equal heads"
            )
    return first


def _dtype(sites: list[AttentionSite]) -> Dtype:
    dtypes = {cache.past.dtype for site in sites for cache in (site.key, site.value)}
    known = [_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES]
    if len(dtypes) != 1 or not known:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ChaiError(f"the caches have type {found}; export with float32, float16 or bfloat16 caches")
    return known[0]


def _vocabulary(model: ir.Model) -> int:
    logits = next((v for v in model.graph.outputs if v.name == "logits"), model.graph.outputs[0])
    size = logits.shape[-1] if logits.shape is not None and len(logits.shape) else None
    if not isinstance(size, int):
        raise ChaiError(
            f"the graph does not state the vocabulary size of output {logits.name}; "
            "run onnx shape inference on it first"
        )
    return size


def _created_with() -> str:
    from chai_export import __version__

    return f"chai_export {__version__}"
