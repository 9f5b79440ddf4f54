"""The Hugging Face model that a bundle came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chai_export.errors import ChaiError
from chai_export.models.geometry import Geometry
from chai_export.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.manifest import Manifest


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
