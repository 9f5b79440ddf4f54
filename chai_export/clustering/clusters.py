"""clusters.json: how many KV heads each layer keeps, and the curves that decided it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chai_export.arguments import path_of, shown, whole
from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.bundle import CLUSTERS_FILE
from chai_export.bundle.manifest import first_problem
from chai_export.bundle.targets import FileKind, json_with_format
from chai_export.errors import ChaiError, UsageError
from chai_export.files import MissingFileError, read_json
from chai_export.op.heads import DecoderHeads
from chai_export.op.kv_sharing import check_same_kept

FORMAT = "chai-clusters/1"
CLUSTERS = FileKind("a clusters.json of chai_export", json_with_format("chai-clusters"))


Count = Annotated[int, Field(ge=1, strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Curve = Annotated[tuple[Finite, ...], Field(min_length=1)]
Peak = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Peaks = Annotated[tuple[Annotated[tuple[Peak, ...], Field(min_length=1)], ...], Field(min_length=1)]


class _File(BaseModel):
    """What clusters.json may hold; a hand-written one has ``format`` and ``kept_heads`` and nothing else."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format: Literal["chai-clusters/1"]
    kept_heads: Annotated[tuple[Count, ...], Field(min_length=1)]
    model: str | None = None
    num_layers: Count | None = None
    num_query_heads: Count | None = None
    num_kv_heads: Count | None = None
    probe_tokens: Count | None = None
    method: str | None = None
    error_curves: tuple[Curve, ...] = ()
    kl_curves: tuple[Curve, ...] = ()
    key_peaks: tuple[Peaks, ...] = ()
    kv_bytes_saved: Finite | None = None
    created_with: str | None = None

    @model_validator(mode="after")
    def _curves_fit(self) -> _File:
        for name, curves in (("error_curves", self.error_curves), ("kl_curves", self.kl_curves)):
            if curves and len(curves) != len(self.kept_heads):
                raise ValueError(f"{name} has {len(curves)} curves for {len(self.kept_heads)} layers")
            for layer, (curve, kept) in enumerate(zip(curves, self.kept_heads, strict=bool(curves))):
                if len(curve) != len(curves[0]) or kept > len(curve):
                    raise ValueError(f"{name}.{layer} has {len(curve)} numbers, which do not fit the others")
        return self

    @model_validator(mode="after")
    def _peaks_fit(self) -> _File:
        if self.key_peaks and len(self.key_peaks) != len(self.kept_heads):
            raise ValueError(f"key_peaks is for {len(self.key_peaks)} of {len(self.kept_heads)} layers")
        sizes = {(len(heads), len(channels)) for heads in self.key_peaks for channels in heads}
        if len(sizes) > 1:
            raise ValueError("key_peaks differs in its sizes from layer to layer or head to head")
        return self


@dataclass(frozen=True)
class Clusters:
    """Result of the offline phase. Everything but ``kept_heads`` may be unknown (None or empty).

    Attributes:
        kept_heads: R of each layer, at least 1.
        model: name of the model it was made for.
        num_layers, num_query_heads, num_kv_heads: L, H, G of that model.
        probe_tokens: P that the curves were measured with, and that an export runs with.
        method: the rule that chose ``kept_heads``.
        error_curves: per layer G numbers; entry k-1 is the clustering error with k KV heads kept: squared
            distance of a head's attention probabilities to those of its representative, mean over query
            heads, probe tokens and windows.
        kv_bytes_saved: share of the KV cache that disappears, 0 … 1.
        created_with: program and version.
        kl_curves: of the shape of the error curves, when the budget was measured: nats per token that a
            layer costs by itself with k KV heads kept; empty otherwise.
        key_peaks: per layer G lists of D numbers, the largest magnitude of each channel of the keys on
            calibration text, after rotary embedding; empty if it was not measured.
        origin: the file it came from, for messages.
    """

    kept_heads: tuple[int, ...]
    model: str | None = None
    num_layers: int | None = None
    num_query_heads: int | None = None
    num_kv_heads: int | None = None
    probe_tokens: int | None = None
    method: str | None = None
    error_curves: tuple[tuple[float, ...], ...] = ()
    kv_bytes_saved: float | None = None
    created_with: str | None = None
    kl_curves: tuple[tuple[float, ...], ...] = ()
    key_peaks: tuple[tuple[tuple[float, ...], ...], ...] = ()
    origin: str = field(default="clusters.json", compare=False)

    def __post_init__(self) -> None:
        """Raise UsageError unless ``kept_heads`` holds counts; a list becomes a tuple."""
        if isinstance(self.kept_heads, (str, bytes)) or not isinstance(self.kept_heads, Iterable):
            raise UsageError(f"kept_heads is {shown(self.kept_heads)}; give one number of KV heads per layer")
        kept = tuple(whole(n, f"{self.origin}: layer {i}") for i, n in enumerate(self.kept_heads))
        object.__setattr__(self, "kept_heads", kept)

    @classmethod
    def load(cls, path: str | Path) -> Clusters:
        """Read a clusters.json; only ``format`` and ``kept_heads`` are required, unknown keys are ignored.

        Raises:
            ChaiError: missing, unreadable, or not in this format.
        """
        path = path_of(path, "clusters")
        again = "correct it or calibrate again"
        try:
            content = read_json(path, fix=again)
        except MissingFileError:
            raise ChaiError(f"there is no {path}; make it with chai-export calibrate") from None
        if content.get("format") != FORMAT:
            found = shown(content.get("format"))
            raise ChaiError(f"{path} has format {found} instead of {FORMAT!r}; calibrate again")
        try:
            return cls(**_File.model_validate(content).model_dump(exclude={"format"}), origin=str(path))
        except ValidationError as error:
            raise ChaiError(f"{path}: {first_problem(error)}; {again}") from None

    @property
    def file_name(self) -> str:
        """In a bundle."""
        return CLUSTERS_FILE

    def save(self, path: str | Path) -> None:
        """Write clusters.json, whole or not at all.

        Raises:
            ChaiError: it cannot be written, or another file is in its place.
        """

        with atomic_file(path, CLUSTERS) as file:
            file.write_text(self.to_text(), encoding="utf-8")

    def to_text(self) -> str:
        """The text of clusters.json."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The content of clusters.json."""
        return {
            "format": FORMAT,
            "model": self.model,
            "num_layers": self.num_layers,
            "num_query_heads": self.num_query_heads,
            "num_kv_heads": self.num_kv_heads,
            "probe_tokens": self.probe_tokens,
            "method": self.method,
            "kept_heads": list(self.kept_heads),
            "error_curves": [list(curve) for curve in self.error_curves],
            **({"kl_curves": [list(curve) for curve in self.kl_curves]} if self.kl_curves else {}),
            "kv_bytes_saved": self.kv_bytes_saved,
            "created_with": self.created_with,
            **({"key_peaks": [[list(head) for head in layer] for layer in self.key_peaks]} if self.key_peaks
               else {}),
        }  # fmt: skip

    def check(self, model: DecoderHeads) -> None:
        """Raise unless these numbers fit a model.

        Raises:
            ChaiError: wrong number of layers, a layer keeps fewer than 1 or more KV heads than it has, or
                layers that read one cache keep different numbers.
        """
        if len(self.kept_heads) != model.num_layers:
            raise ChaiError(
                f"{self.origin} is for {len(self.kept_heads)} layers, the model has {model.num_layers}; "
                "calibrate this model"
            )
        for layer, kept in enumerate(self.kept_heads):
            if not 1 <= kept <= model.num_kv_heads:
                raise ChaiError(
                    f"{self.origin}: layer {layer} keeps {kept} KV heads, it must be between 1 and the "
                    f"{model.num_kv_heads} that the model has; correct it or calibrate this model"
                )
        if model.kv_source_layers is not None:
            try:
                check_same_kept(self.kept_heads, model.kv_source_layers)
            except ValueError as error:
                raise ChaiError(f"{self.origin}: {error}; correct it or calibrate this model") from None


def load_clusters(clusters: Clusters | str | Path) -> Clusters:
    """The typed form of clusters given as such or as a path.

    Raises:
        ChaiError: the file is missing or malformed.
    """
    return clusters if isinstance(clusters, Clusters) else Clusters.load(clusters)
