"""The part of a manifest that a source graph decides, and the graphs for which there is none."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir

from chai_export.bundle.choices import SourceKind
from chai_export.bundle.manifest import Manifest, Source
from chai_export.errors import ChaiError
from chai_export.graph.match.site import AttentionSite, kv_sources
from chai_export.graph.read.quantised_weights import quantised_weights
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.op.function import MIN_OPSET
from chai_export.op.heads import HeadCounts
from chai_export.op.precision import EXACT, Precision
from chai_export.op.signature import VERSION
from chai_export.version import CREATED_WITH

_DTYPES = {ir.DataType(ELEMENT_TYPES[dtype].onnx): dtype for dtype in Dtype}


def draft_manifest(
    path: Path,
    source: ir.Model,
    sites: list[AttentionSite],
    probe_tokens: int,
    precision: Precision = EXACT,
) -> Manifest:
    """What the bundle of ``source``, read from ``path``, would be, with all heads kept and nothing proven.

    Raises:
        ChaiError: the opset is too old, layers differ in their heads, the caches are no floats, the
            vocabulary size is not stated, or rows cannot be stored as asked.
    """
    opset = require_opset(path, source)
    heads = _common_heads(sites)
    key_bits, value_bits = precision.by_layer(len(sites))
    return Manifest(
        op_version=VERSION,
        dtype=_dtype(sites),
        num_layers=len(sites),
        **asdict(heads),
        vocab_size=_vocabulary(source),
        kept_heads=[heads.num_kv_heads] * len(sites),
        kv_source_layers=kv_sources(sites),
        key_bits=key_bits,
        value_bits=value_bits,
        group=precision.group(heads),
        windows=_windows(sites),
        probe_tokens=probe_tokens,
        opset=opset,
        weights=quantised_weights(source.graph),
        source=Source(kind=SourceKind.ONNX, name=path.name),
        created_with=CREATED_WITH,
    )


def require_opset(path: Path, source: ir.Model) -> int:
    """The opset of a graph that the op's function body can stand in.

    Raises:
        ChaiError: it is too old.
    """
    opset = source.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ChaiError(f"{path} uses opset {opset}; export it again with opset {MIN_OPSET} or newer")
    return opset


def _common_heads(sites: list[AttentionSite]) -> HeadCounts:
    """The heads that all layers share.

    Raises:
        ChaiError: a layer has other heads than the first.
    """
    first = sites[0].heads
    for site in sites:
        pairs = zip(asdict(first).items(), asdict(site.heads).values(), strict=True)
        for (name, wanted), found in pairs:
            if found != wanted:
                raise ChaiError(
                    f"layer {site.layer} has {name} {found}, layer 0 has {wanted}; "
                    "choose a model whose layers have equal heads"
                )
    return first


def _windows(sites: list[AttentionSite]) -> list[int] | None:
    """The window of each layer, 0 for none; None if no layer has one.

    Raises:
        ChaiError: a layer has another window than the one whose cache it reads.
    """
    windows = [site.terms.window for site in sites]
    for site in sites:
        source = site.source_layer
        if source is not None and windows[site.layer] != windows[source]:
            raise ChaiError(
                f"layer {site.layer} sees {windows[site.layer] or 'all'} positions and reads the cache of "
                f"layer {source}, which sees {windows[source] or 'all'}; choose a model whose layers on one "
                "cache see the same"
            )
    return windows if any(windows) else None


def _dtype(sites: list[AttentionSite]) -> Dtype:
    dtypes = {cache.past.dtype for site in sites for cache in (site.key, site.value)}
    known = [_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES]
    if len(dtypes) != 1 or not known:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ChaiError(f"the caches have type {found}; export with caches of {', '.join(Dtype)}")
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
