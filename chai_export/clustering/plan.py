"""plan.json: what each layer's cache keeps and in how many bits, what that costs, and the proof.

A plan is made by :mod:`chai_export.clustering.planner`; docs/plan.md says how, and what it promises.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chai_export.arguments import path_of, shown
from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.bundle import PLAN_FILE
from chai_export.bundle.manifest import Bits, first_problem
from chai_export.bundle.targets import FileKind, json_with_format
from chai_export.clustering.clusters import FORMAT as CLUSTERS_FORMAT
from chai_export.clustering.clusters import Clusters, Count, Finite, Peaks
from chai_export.errors import ChaiError
from chai_export.files import MissingFileError, read_json
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.heads import DecoderHeads
from chai_export.op.precision import Precision

FORMAT = "chai-plan/1"
_WRITTEN = json_with_format("chai-plan"), json_with_format("chai-clusters")
PLAN = FileKind("a plan or clusters.json of chai_export", lambda path: any(ours(path) for ours in _WRITTEN))
"""What `calibrate` writes: one may replace the other."""
_AGAIN = "correct it or calibrate again"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class LayerPlan(_Part):
    """One layer: R, and the bits of keys and values (0: the model's dtype)."""

    kept_heads: Count
    key_bits: Bits
    value_bits: Bits


class Loss(_Part):
    """What a plan costs: perplexity over that of the exact cache, and divergence in nats per token."""

    perplexity_ratio: Finite
    kl: Finite


class Check(Loss):
    """The same, measured on text that nothing was chosen by.

    ``perplexity_error`` is the standard error of the ratio, from its spread over ``windows``.
    """

    tokens: Count
    windows: Count
    top1_agreement: Finite
    perplexity_error: Finite


class WholePlan(_Part):
    """A plan that was run as a whole, on text of the choice: its layers' sum of damage, and the truth.

    ``kl`` and ``nll_change`` are nats per token over ``tokens``.
    """

    kl_sum: Finite
    kl: Finite
    nll_change: Finite
    tokens: Count


class Measurement(_Part):
    """What every rule needs: damage of the options, and how its sum compares with whole plans.

    ``damage`` has, for each cache (layer with a cache of its own) and each of ``kept_heads``, ``key_bits``
    and ``value_bits``, nats per token that this option costs by itself.
    """

    kept_heads: tuple[Count, ...]
    key_bits: tuple[Bits, ...]
    value_bits: tuple[Bits, ...]
    damage: tuple[tuple[tuple[tuple[Finite, ...], ...], ...], ...]
    tokens: Count
    windows: Count
    whole_plans: tuple[WholePlan, ...]

    @model_validator(mode="after")
    def _shapes_fit(self) -> Measurement:
        wanted = (len(self.kept_heads), len(self.key_bits), len(self.value_bits))
        for cache, table in enumerate(self.damage):
            found = {(len(table), len(by_key), len(by_value)) for by_key in table for by_value in by_key}
            if found != {wanted}:
                raise ValueError(f"damage of cache {cache} is not {' x '.join(map(str, wanted))} numbers")
        return self


class Plan(_Part):
    """What a KV cache is to hold, layer by layer. Only ``layers`` is needed; the rest may be unknown.

    Attributes:
        layers: what each layer keeps; layers that read one cache are alike.
        group: elements of a row that share a scale; None: the largest that fits the model.
        rule: what was asked for, such as "loss 0.01".
        model, num_query_heads, num_kv_heads, head_dim, value_head_dim, kv_source_layers: of the model it was
            made for.
        probe_tokens: P that it was measured with, and that an export runs with.
        expected: what the measurement says that it costs.
        checked: what it cost on text that nothing was chosen by.
        forced: whether it was written although the check broke the promise.
        kv_bytes_share: bytes of a token over those of all heads in float16.
        kv_bytes_share_every_head: the same of the plan for the same rule that keeps every head; None where
            there is none.
        key_peaks: per layer G lists of D numbers, the largest magnitude of each channel of the keys.
        measured: what other rules can reuse.
        checks: every check so far, by :func:`chai_export.clustering.plan_check.check_key`.
        created_with: program and version.
        origin: the file it came from, for messages.
    """

    layers: Annotated[tuple[LayerPlan, ...], Field(min_length=1)]
    group: Count | None = None
    rule: str | None = None
    model: str | None = None
    num_query_heads: Count | None = None
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    value_head_dim: Count | None = None
    kv_source_layers: tuple[int, ...] | None = None
    probe_tokens: Count | None = None
    expected: Loss | None = None
    checked: Check | None = None
    forced: bool = False
    kv_bytes_share: Finite | None = None
    kv_bytes_share_every_head: Finite | None = None
    key_peaks: tuple[Peaks, ...] = ()
    measured: Measurement | None = None
    checks: dict[str, Check] = Field(default_factory=dict)
    created_with: str | None = None
    origin: str = Field(default="plan.json", exclude=True)

    @model_validator(mode="after")
    def _peaks_fit(self) -> Plan:
        if self.key_peaks and len(self.key_peaks) != len(self.layers):
            raise ValueError(f"key_peaks is for {len(self.key_peaks)} of {len(self.layers)} layers")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.json; only ``format`` and ``layers`` are required, unknown keys are ignored.

        Raises:
            ChaiError: missing, unreadable, or not in this format.
        """
        path = path_of(path, "plan")
        content = _content(path)
        if content.get("format") != FORMAT:
            raise ChaiError(
                f"{path} has format {shown(content.get('format'))} instead of {FORMAT!r}; calibrate again"
            )
        return cls._from(content, path)

    @classmethod
    def _from(cls, content: dict[str, Any], path: Path) -> Plan:
        try:
            # As JSON and strictly: 4.0, true and "4" are no counts.
            text = json.dumps({**content, "origin": str(path)})
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise ChaiError(f"{path}: {first_problem(error)}; {_AGAIN}") from None

    @property
    def file_name(self) -> str:
        """In a bundle."""
        return PLAN_FILE

    @property
    def precision(self) -> Precision:
        """Of all layers."""
        return Precision(self.key_bits, self.value_bits, self.group)

    def save(self, path: str | Path) -> None:
        """Write plan.json, whole or not at all.

        Raises:
            ChaiError: it cannot be written, or another file is in its place.
        """
        with atomic_file(path, PLAN) as file:
            file.write_text(self.to_text(), encoding="utf-8")

    def to_text(self) -> str:
        """The text of plan.json."""
        return json.dumps(self.to_json()) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {"format": FORMAT, **self.model_dump(mode="json", exclude_none=True)}

    @property
    def kept_heads(self) -> tuple[int, ...]:
        """R of each layer."""
        return tuple(layer.kept_heads for layer in self.layers)

    @property
    def key_bits(self) -> tuple[int, ...]:
        """Of each layer."""
        return tuple(layer.key_bits for layer in self.layers)

    @property
    def value_bits(self) -> tuple[int, ...]:
        """Of each layer."""
        return tuple(layer.value_bits for layer in self.layers)

    @property
    def heads(self) -> DecoderHeads | None:
        """Of the model it was made for, where that is known."""
        sizes = self.num_query_heads, self.num_kv_heads, self.head_dim, self.value_head_dim
        if None in sizes:
            return None
        numbers = [size for size in sizes if size is not None]
        return DecoderHeads(*numbers, num_layers=len(self.layers), kv_source_layers=self.kv_source_layers)

    def check(self, model: DecoderHeads) -> None:
        """Raise unless this plan fits a model.

        Raises:
            ChaiError: it is for other layers or heads, or gives layers that read one cache different ones.
        """
        Clusters(kept_heads=self.kept_heads, origin=self.origin).check(model)
        try:
            CacheStorage(model, Dtype.FLOAT16, self.key_bits, self.value_bits, self.group or 2)
        except ValueError as error:
            raise ChaiError(f"{self.origin}: {error}; {_AGAIN}") from None

    def forced_warning(self) -> str | None:
        """What to say of a plan that costs more than it was asked to; None of others."""
        if not self.forced or self.checked is None:
            return None
        return (
            f"the plan was forced: asked for {self.rule}, it raised perplexity by "
            f"{self.checked.perplexity_ratio - 1:.2%} on held-out text"
        )


Chosen = Plan | Clusters
"""What a bundle can be made with."""


def every_head(heads: DecoderHeads) -> Clusters:
    """What a bundle is made with where nothing was calibrated."""
    return Clusters(kept_heads=tuple(heads.all_kept), num_layers=heads.num_layers, method="every head kept")


def precision_of(
    chosen: Chosen | None, key_bits: int | None, value_bits: int | None, otherwise: Precision | None = None
) -> Precision:
    """What caches are stored in: as asked for, else as planned, else ``otherwise``.

    Raises:
        UsageError: there is no storage of such bits.
    """
    return Precision.asked(key_bits, value_bits, chosen.precision if isinstance(chosen, Plan) else otherwise)


def load_plan(chosen: Chosen | str | Path) -> Chosen:
    """What a bundle is to be made with, given as such or as a path of either format.

    Raises:
        ChaiError: the file is missing or malformed.
    """
    if isinstance(chosen, Plan | Clusters):
        return chosen
    path = path_of(chosen, "plan")
    content = _content(path)
    if content.get("format") == CLUSTERS_FORMAT:
        return Clusters.load(path)
    if content.get("format") != FORMAT:
        raise ChaiError(
            f"{path} has format {shown(content.get('format'))} instead of {FORMAT!r} or {CLUSTERS_FORMAT!r}; "
            "calibrate again"
        )
    return Plan._from(content, path)


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, fix=_AGAIN)
    except MissingFileError:
        raise ChaiError(f"there is no {path}; make it with chai-export calibrate") from None
