"""The torch side of a comparison: the model that a bundle came from, and what the bundle should compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.clustering.equaliser import Equalisers, equalisers
from chai_export.clustering.plan import load_plan
from chai_export.errors import ChaiError
from chai_export.models.geometry import Geometry
from chai_export.models.loading import load_model
from chai_export.op.dtypes import ELEMENT_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Manifest
    from chai_export.models.oracle import Oracle

Logits = Callable[[Sequence[int]], NDArray[np.float32]]
"""Token ids of one fresh sequence to logits at every position, float32 [T, V]."""


def load_reference(
    reference: str | Path | PreTrainedModel, manifest: Manifest, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model behind a bundle, with the bundle's rounded weights and float32 arithmetic.

    Args:
        reference: directory, hub id or model.
        manifest: of the bundle.
        trust_remote_code: run code that the model brings along.

    Raises:
        ChaiError: it cannot be used, or its sizes are not those of the bundle.
    """
    from chai_export.models.kv_sources import describe_model

    if isinstance(reference, (str, Path)) and Path(reference).suffix == ".onnx":
        raise ChaiError(
            f"{reference} is an ONNX file, which only `chai-export verify` takes as a reference; "
            "give a Hugging Face model"
        )
    model = load_model(reference, dtype=manifest.dtype, trust_remote_code=trust_remote_code)
    if manifest.dtype != "float32":
        # In place unless the model is the caller's: two copies of a large model may not fit.
        model = load_model(model, dtype="float32") if model is reference else model.float()
    _require_same_sizes(manifest, describe_model(model))
    return model


def oracle_of(model: PreTrainedModel, bundle: Bundle, heads: str = "chai", *, exact: bool = False) -> Oracle:
    """The torch oracle that does what the bundle does, or would do if it cached rows as they are computed."""
    from chai_export.models.oracle import Oracle

    manifest = bundle.manifest
    kept, online = manifest.heads(heads), manifest.static is None
    if exact or not manifest.storage.rounds:
        return Oracle(model, kept, manifest.probe_tokens, online=online)
    return Oracle(
        model,
        kept,
        manifest.probe_tokens,
        online=online,
        storage=manifest.storage,
        equalisers=_equalisers(bundle),
    )


def _equalisers(bundle: Bundle) -> Equalisers:
    """What the graph divides keys by, in the model's dtype as there."""
    key_bits, dtype = bundle.manifest.storage.key_bits, ELEMENT_TYPES[bundle.manifest.dtype].numpy
    if 4 not in key_bits:
        return {}
    found = equalisers(load_plan(bundle.clusters_path).key_peaks, key_bits)
    return {layer: factors.astype(dtype).astype(np.float32) for layer, factors in found.items()}


def fixed_maps(manifest: Manifest) -> NDArray[np.int32] | None:
    """Head maps of static membership, int32 [L, H]; None where each sequence decides its own."""
    return None if manifest.static is None else np.array(manifest.static.head_maps, np.int32)


def reference_logits(model: PreTrainedModel, bundle: Bundle, heads: str) -> Logits:
    """The model in torch: unchanged, or for ``heads="chai"`` the oracle, which stores rows as the bundle."""
    from chai_export.models.oracle import model_logits

    if heads == "all":
        return partial(model_logits, model)
    return partial(oracle_of(model, bundle).logits, head_maps=fixed_maps(bundle.manifest))


def _require_same_sizes(manifest: Manifest, geometry: Geometry) -> None:
    for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_dim", "value_head_dim", "vocab_size"):
        ours, theirs = getattr(manifest, name), getattr(geometry, name)
        if ours != theirs:
            raise ChaiError(
                f"the bundle has {name} {ours} and the reference model {theirs}; "
                "give the model that the bundle was made from with --reference"
            )
    if manifest.cache_layers != geometry.cache_layers:
        raise ChaiError(
            f"the bundle has caches for layers {manifest.cache_layers} and the reference model for "
            f"{geometry.cache_layers}; give the model that the bundle was made from with --reference"
        )
