"""Optimisation profiles: the shapes that an engine accepts, one profile for prefill and one for decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chai_export.bundle.graph_io import BATCH, CAPACITY, OUTPUTS, TOKENS, kept_sizes
from chai_export.bundle.manifest import Manifest
from chai_export.runtime.scheduler import LONGEST_CHUNK

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, likely and largest shape of one input."""

    least: Shape
    likely: Shape
    most: Shape


def profiles(manifest: Manifest, max_batch: int, max_seq: int) -> tuple[dict[str, Range], dict[str, Range]]:
    """Shapes by input name for prefill (S up to a chunk, any output positions) and decode (S = N = 1).

    The capacity goes up to ``max_seq``. The K cache of layer i has from kept_heads[i] KV heads, the likely
    number, up to all of them, so that one engine also runs as plain attention.
    """
    chunk = longest_chunk(manifest, max_seq)
    prefill = _profile(manifest, max_seq, (1, 1, max_batch), (1, chunk, chunk), (1, 1, chunk))
    decode = _profile(manifest, max_seq, (1, max_batch, max_batch), (1, 1, 1), (1, 1, 1))
    return prefill, decode


def longest_chunk(manifest: Manifest, max_seq: int) -> int:
    """Most new tokens of a row in one step."""
    return min(max(LONGEST_CHUNK, manifest.probe_tokens), max_seq)


def _profile(
    manifest: Manifest,
    max_seq: int,
    batch: tuple[int, int, int],
    tokens: tuple[int, int, int],
    outputs: tuple[int, int, int],
) -> dict[str, Range]:
    """Each tuple holds the smallest, likely and largest size."""
    kept = (manifest.kept_heads, manifest.kept_heads, manifest.head_counts.all_kept)
    sizes = [
        {BATCH: b, TOKENS: s, OUTPUTS: n, CAPACITY: c, **kept_sizes(r)}
        for b, s, n, c, r in zip(batch, tokens, outputs, (1, max_seq, max_seq), kept, strict=True)
    ]
    return {value.name: Range(*map(value.shape, sizes)) for value in manifest.io.inputs}


def trtexec_shapes(profile: Mapping[str, Range]) -> list[str]:
    """``--minShapes``, ``--optShapes`` and ``--maxShapes`` of a profile, as trtexec takes them."""

    def text(flag: str, attribute: str) -> str:
        shapes = (f"{name}:{'x'.join(map(str, getattr(r, attribute)))}" for name, r in profile.items())
        return f"--{flag}Shapes={','.join(shapes)}"

    return [text("min", "least"), text("opt", "likely"), text("max", "most")]
