"""The torch side of a comparison: what the model that a bundle came from, and the bundle, should compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.clustering.equaliser import Equalisers, equalisers
from chai_export.clustering.plan import load_plan
from chai_export.op.dtypes import ELEMENT_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Manifest
    from chai_export.models.oracle import Oracle

Logits = Callable[[Sequence[int]], NDArray[np.float32]]
"""Token ids of one fresh sequence to logits at every position, float32 [T, V]."""


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
