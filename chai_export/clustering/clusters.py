"""clusters.json: how many KV heads each layer keeps, and the curves that decided it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chai_export.errors import ChaiError
from chai_export.op.kv_sharing import check_same_kept

FORMAT = "chai-clusters/1"


class HeadCounts(Protocol):
    """The part of a geometry that clusters must fit."""

    @property
    def num_layers(self) -> int:
        """L."""

    @property
    def num_kv_heads(self) -> int:
        """G."""

    @property
    def kv_source_layers(self) -> Sequence[int] | None:
        """The layer whose cache each layer reads; None if each has its own."""


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
    origin: str = field(default="clusters.json", compare=False)

    @classmethod
    def load(cls, path: str | Path) -> Clusters:
        """Read a clusters.json; only ``format`` and ``kept_heads`` are required, unknown keys are ignored.

        Raises:
            ChaiError: missing, unreadable, or not in this format.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ChaiError(f"there is no {path}; make it with chai-export calibrate") from error
        except OSError as error:
            raise ChaiError(f"{path} cannot be read ({error.strerror}); check the path") from error
        except ValueError as error:
            raise ChaiError(f"{path} is not valid JSON ({error}); calibrate again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise ChaiError(f"{path} has format {found!r} instead of {FORMAT!r}; calibrate again")
        kept = content.get("kept_heads")
        if not isinstance(kept, list) or not kept or not all(_is_count(number) for number in kept):
            raise ChaiError(
                f"{path}: kept_heads must be a list with one number of KV heads, at least 1, per layer, not "
                f"{json.dumps(kept)[:80]}; correct it or calibrate again"
            )
        return cls(kept_heads=tuple(kept), origin=str(path), **_optional(content))

    def save(self, path: str | Path) -> None:
        """Write clusters.json, whole or not at all.

        Raises:
            ChaiError: it cannot be written.
        """
        from chai_export.bundle.atomic import atomic_file

        with atomic_file(path) as partial:
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

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
        }

    def check(self, geometry: HeadCounts) -> None:
        """Raise unless these numbers fit a model.

        Raises:
            ChaiError: wrong number of layers, a layer keeps fewer than 1 or more KV heads than it has, or
                layers that read one cache keep different numbers.
        """
        if len(self.kept_heads) != geometry.num_layers:
            raise ChaiError(
                f"{self.origin} is for {len(self.kept_heads)} layers, the model has {geometry.num_layers}; "
                "calibrate this model"
            )
        for layer, kept in enumerate(self.kept_heads):
            if not 1 <= kept <= geometry.num_kv_heads:
                raise ChaiError(
                    f"{self.origin}: layer {layer} keeps {kept} KV heads, it must be between 1 and the "
                    f"{geometry.num_kv_heads} that the model has; correct it or calibrate this model"
                )
        if geometry.kv_source_layers is not None:
            try:
                check_same_kept(self.kept_heads, geometry.kv_source_layers)
            except ValueError as error:
                raise ChaiError(f"{self.origin}: {error}; correct it or calibrate this model") from None


def load_clusters(clusters: Clusters | str | Path) -> Clusters:
    """The typed form of clusters given as such or as a path.

    Raises:
        ChaiError: the file is missing or malformed.
    """
    return clusters if isinstance(clusters, Clusters) else Clusters.load(clusters)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _optional(content: dict[str, Any]) -> dict[str, Any]:
    """The fields that are there with a usable type; a hand-written file may have any of them or none."""
    types: dict[str, type | tuple[type, ...]] = {
        "model": str, "num_layers": int, "num_query_heads": int, "num_kv_heads": int, "probe_tokens": int,
        "method": str, "kv_bytes_saved": (int, float), "created_with": str,
    }  # fmt: skip
    fields = {name: content[name] for name, kind in types.items() if isinstance(content.get(name), kind)}
    for name in ("error_curves", "kl_curves"):
        curves = content.get(name)
        if isinstance(curves, list) and all(isinstance(curve, list) for curve in curves):
            fields[name] = tuple(tuple(float(cost) for cost in curve) for curve in curves)
    return fields
