"""Optimisation profiles: the shapes that an engine accepts, one profile for prefill and one for decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chai_export.bundle.graph_io import (
    BATCH,
    OUTPUTS,
    PAGE_LENGTH,
    ROW_PAGES,
    TOKENS,
    kept_sizes,
    pool_sizes,
)
from chai_export.bundle.manifest import Manifest
from chai_export.runtime import pages
from chai_export.runtime.scheduler import LONGEST_CHUNK

Shape = tuple[int, ...]
Sizes = tuple[int, int, int]
"""Smallest, likely and largest."""


@dataclass(frozen=True)
class Range:
    """Smallest, likely and largest shape of one input."""

    least: Shape
    likely: Shape
    most: Shape


def profiles(
    manifest: Manifest, max_batch: int, max_seq: int, page_length: int = pages.PAGE_LENGTH
) -> tuple[dict[str, Range], dict[str, Range]]:
    """Shapes by input name for prefill (S up to a chunk, any output positions) and decode (S = N = 1).

    A row has up to the pages that ``max_seq`` tokens take, a pool up to those of ``max_batch`` such rows; the
    length of a page is fixed. The K cache of layer i has from kept_heads[i] KV heads, the likely number, up
    to all of them, so that one engine also runs as plain attention.
    """
    chunk = longest_chunk(manifest, max_seq)
    most = -(-max_seq // page_length)
    row_pages, pool = (1, most, most), (1, max_batch * most, max_batch * most)

    def profile(batch: Sizes, tokens: Sizes, outputs: Sizes) -> dict[str, Range]:
        kept = (manifest.kept_heads, manifest.kept_heads, manifest.head_counts.all_kept)
        sizes = [
            {BATCH: b, TOKENS: s, OUTPUTS: n, ROW_PAGES: m, PAGE_LENGTH: page_length}
            | kept_sizes(r)
            | pool_sizes(manifest.io, p)
            for b, s, n, m, p, r in zip(batch, tokens, outputs, row_pages, pool, kept, strict=True)
        ]
        return {value.name: Range(*map(value.shape, sizes)) for value in manifest.io.inputs}

    return (
        profile((1, 1, max_batch), (1, chunk, chunk), (1, 1, chunk)),
        profile((1, max_batch, max_batch), (1, 1, 1), (1, 1, 1)),
    )


def longest_chunk(manifest: Manifest, max_seq: int) -> int:
    """Most new tokens of a row in one step."""
    return min(max(LONGEST_CHUNK, manifest.probe_tokens), max_seq)


def trtexec_shapes(profile: Mapping[str, Range]) -> list[str]:
    """``--minShapes``, ``--optShapes`` and ``--maxShapes`` of a profile, as trtexec takes them."""

    def text(flag: str, attribute: str) -> str:
        shapes = (f"{name}:{'x'.join(map(str, getattr(r, attribute)))}" for name, r in profile.items())
        return f"--{flag}Shapes={','.join(shapes)}"

    return [text("min", "least"), text("opt", "likely"), text("max", "most")]
