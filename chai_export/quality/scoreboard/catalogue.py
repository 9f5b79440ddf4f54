"""Every method of the scoreboard at the settings that cover a range of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from chai_export.clustering.plan import Plan
from chai_export.errors import ChaiError, UsageError
from chai_export.models.geometry import Geometry
from chai_export.quality.clustered_run import fixed_maps, method_maps
from chai_export.quality.methods import METHODS
from chai_export.quality.scoreboard import evicted, ours, pruned, quantised
from chai_export.quality.scoreboard.method import CacheMethod
from chai_export.quality.scoreboard.observed import Observed

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
"""Of float16's bytes."""
_GROUP = 32
"""Of KIVI, where it divides the head dim."""
_BITS = ((16, 16), (8, 8), (8, 4), (4, 4))
_CHAI = {"chai": "chai", "chai-k-means": "k-means", "chai-reference": "agglomerative-unmasked"}

Heads = Callable[[float], tuple[int, ...]]
"""Share of the KV cache that is saved -> kept heads by layer."""
StaticMaps = Callable[[Sequence[int]], NDArray[np.int32]]
"""Kept heads by layer -> head maps [L, H] from calibration text."""


def names() -> tuple[str, ...]:
    """Of all methods, in the order of tables."""
    return (
        *("plan", "bits", *_CHAI, "chai-static", "chai-qkv", "deja-vu", "spatten", "kivi", "kvquant"),
        *("think", "slim", "duo", "h2o", "squeeze"),
    )


def check_names(wanted: Sequence[str]) -> None:
    """Raise unless there is a method of each name.

    Raises:
        UsageError: there is none.
    """
    for name in wanted:
        if name not in names():
            raise UsageError(f"--methods: there is no method {name!r}; choose from {', '.join(names())}")


def methods(
    wanted: Sequence[str],
    plan: Plan,
    observed: Observed,
    geometry: Geometry,
    *,
    shares: Sequence[float],
    tokens: int,
    heads_for: Heads,
    static_maps: StaticMaps,
    probe_tokens: int,
) -> tuple[list[CacheMethod], dict[str, str]]:
    """Methods at the settings whose bytes lie near ``shares`` where they can be chosen.

    Args:
        wanted: names.
        plan: with measurements.
        observed: calibration.
        geometry: of the model.
        shares: of float16's bytes.
        tokens: of the sequences that are measured.
        heads_for: allocates kept heads for CHAI.
        static_maps: of CHAI-static.
        probe_tokens: P.

    Returns:
        The methods, and by name why some, or some of their settings, are not there.
    """
    heads = observed.heads
    made: dict[str, list[Callable[[], CacheMethod]]] = {name: [] for name in wanted}

    def add(name: str, *settings: Callable[[], CacheMethod]) -> None:
        if name in made:
            made[name].extend(settings)

    def by_heads(build: Callable[[tuple[int, ...]], CacheMethod], share: float) -> CacheMethod:
        if heads.num_kv_heads == 1:
            raise ChaiError("a layer of one KV head has no keys to share")
        return build(heads_for(1 - share))

    def online(name: str, kept: tuple[int, ...]) -> CacheMethod:
        method = METHODS[_CHAI[name]]
        exact = probe_tokens if method.exact_probe else 0
        choose = method_maps(method, kept, probe_tokens, 0)
        return ours.chai(name, heads, kept, choose, exact, on_op=name == "chai")

    def static(kept: tuple[int, ...]) -> CacheMethod:
        return ours.chai("chai-static", heads, kept, fixed_maps(static_maps(kept)), 0, on_op=True)

    def shared_values(kept: tuple[int, ...]) -> CacheMethod:
        return pruned.chai_qkv(heads, kept, probe_tokens)

    for key_bits, value_bits in _BITS:
        add("bits", partial(ours.fixed_bits, plan, heads, key_bits, value_bits))
    few = 1 - 0.45 * (1 - pruned.least_share(heads))  # half of what keys have to give, and nearly nothing
    for share in (0.5 * (1 + few), few):
        for name in _CHAI:
            add(name, partial(by_heads, partial(online, name), share))
        add("chai-static", partial(by_heads, static, share))
        add("chai-qkv", partial(by_heads, shared_values, share))
    for share in shares:
        add("plan", partial(ours.planned, plan, heads, share))
        add("duo", partial(evicted.duo, observed, max(0.0, share - 0.15), max(8, int(0.15 * tokens))))
        add("h2o", partial(evicted.h2o, heads, max(2, int(share * tokens))))
        add("squeeze", partial(evicted.squeeze, observed, max(2, int(share * tokens))))
    for share in (shares[-1], 0.9):
        add("deja-vu", partial(pruned.deja_vu, observed, share))
        add("spatten", partial(pruned.spatten, observed, share))
    group = math.gcd(_GROUP, heads.value_head_dim)
    for bits in (4, 2):
        add("kivi", *(partial(quantised.kivi, heads, bits, group, residual) for residual in (32, 128)))
    for bits in (4, 3, 2):
        add("kvquant", partial(quantised.kvquant, observed, bits))
    for share in (0.75, 0.5):
        add("think", partial(pruned.think, heads, share))
    add("slim", partial(pruned.slim, observed, geometry.hidden_size))
    return _build(made)


def _build(made: dict[str, list[Callable[[], CacheMethod]]]) -> tuple[list[CacheMethod], dict[str, str]]:
    found, missing = [], {}
    for name, settings in made.items():
        for build in settings:
            try:
                found.append(build())
            except ChaiError as error:
                missing[name] = str(error)
    return found, missing
