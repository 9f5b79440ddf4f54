"""Proof of the whole model: the finished bundle graph at R = G against the source graph, in float32.

Both graphs run piece by piece, so this takes the memory of a piece and not of the model. It covers what the
single attentions cannot: positions, the order of caches and outputs, and the gather of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from chai_export.bundle.graph_io import (
    HEAD_MAP,
    INPUT_IDS,
    LENGTHS,
    LOGITS,
    OUTPUT_POSITIONS,
    PAST_LENGTHS,
    ROPE_LENGTHS,
    page_table,
    past_key,
    past_value,
    present_key,
    present_value,
)
from chai_export.bundle.manifest import Manifest
from chai_export.clustering.equaliser import Equalisers
from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.match.site import AttentionSite, with_cache
from chai_export.graph.prove.evaluate import EvaluationError
from chai_export.graph.prove.exact_activations import exact_activations
from chai_export.graph.prove.exact_storage import exact_storage
from chai_export.graph.prove.segments import Array, run_in_segments

RELATIVE_TOLERANCE = 1e-4
"""Of the largest logit (or 1 if that is smaller), in float32."""

_CASES = ((Sizes(2, 5, 0), 2), (Sizes(2, 3, 4), 1))
"""Sizes, and how many tokens of the last row are padding."""


def prove_model(
    source: ir.Model,
    roles: Roles,
    sites: list[AttentionSite],
    bundle: ir.Model,
    draft: Manifest,
    equalisers: Equalisers = MappingProxyType({}),
) -> float:
    """Compare logits and presents of both graphs on random tokens and caches; return the largest difference.

    Both are edited so that their activations are not quantised (:mod:`exact_activations`), and the bundle's
    so that its caches, those of ``draft``, are not (:mod:`exact_storage`). Its keys are the source's divided
    by ``equalisers``.

    Raises:
        ChaiError: they differ by more than the tolerance.
    """
    exact_storage(bundle, draft)
    for model in (source, bundle):
        exact_activations(model)
    vocabulary = _vocabulary(source)
    generator = np.random.default_rng(0)
    data = [_case(sizes, padded, sites, vocabulary, generator) for sizes, padded in _cases(sites)]
    rows = [(case, row) for case in data for row in range(case.sizes.batch)]
    try:
        sources: list[Mapping[str, Array]] = [_source_inputs(*each, roles, sites) for each in rows]
        theirs = iter(run_in_segments(source, sources))
    except EvaluationError as error:
        raise ChaiError(
            f"the source model cannot be run by ONNX Runtime ({error}), so the rewrite cannot be proven; "
            "export it again with another opset"
        ) from error
    try:
        mine = run_in_segments(bundle, [_bundle_inputs(case, sites, equalisers) for case in data])
    except EvaluationError as error:
        raise ChaiError(
            f"the rewritten model differs from the source: ONNX Runtime cannot run it ({error}); "
            "nothing was written; report this model"
        ) from error
    worst, tolerance = 0.0, RELATIVE_TOLERANCE
    logits_name = next(str(v.name) for v in source.graph.outputs if not _is_present(v, sites))
    for case, my in zip(data, mine, strict=True):
        for row, valid in enumerate(case.lengths):
            their = next(theirs)
            tolerance = RELATIVE_TOLERANCE * max(1.0, float(np.abs(their[logits_name]).max()))
            end = case.sizes.past + int(valid)
            # Those of all tokens, or of the last one.
            logits = their[logits_name].reshape(-1, their[logits_name].shape[-1])
            pairs = [("the logits", logits, my[LOGITS][row, int(valid) - len(logits) : valid])]
            for site in with_cache(sites):
                keys = their[str(site.key.present.name)][0, :, :end]
                values = their[str(site.value.present.name)][0, :, :end]
                i = site.layer
                own_keys = my[present_key(i)][row, :, :end] * _columns(equalisers, i)
                pairs.append((f"the keys of layer {i}", keys, own_keys))
                pairs.append((f"the values of layer {i}", values, my[present_value(i)][row, :, :end]))
            for what, a, b in pairs:
                difference = float(np.max(np.abs(a - b), initial=0.0)) if a.shape == b.shape else float("inf")
                if not difference <= tolerance:
                    raise ChaiError(
                        f"the rewritten model differs from the source: {what} by {difference:.3g} (tolerance "
                        f"{tolerance:.3g}); nothing was written; report this model"
                    )
                worst = max(worst, difference)
    return worst


def _cases(sites: list[AttentionSite]) -> list[tuple[Sizes, int]]:
    """Sizes that the source can run: one token after a past where it does not take several."""
    return [
        (sizes, padded) if sites[0].chunks or not sizes.past else (Sizes(sizes.batch, 1, sizes.past), 0)
        for sizes, padded in _CASES
    ]


class _Case:
    def __init__(
        self, sizes: Sizes, lengths: Array, tokens: Array, caches: list[tuple[Array, Array]]
    ) -> None:
        self.sizes = sizes
        self.lengths = lengths
        self.tokens = tokens
        self.caches = caches


def _case(
    sizes: Sizes, padded: int, sites: list[AttentionSite], vocabulary: int, generator: np.random.Generator
) -> _Case:
    lengths = np.full(sizes.batch, sizes.tokens, np.int32)
    lengths[-1] -= padded
    tokens = generator.integers(0, vocabulary, (sizes.batch, sizes.tokens)).astype(np.int64)
    caches = []
    for site in with_cache(sites):
        shape = (sizes.batch, site.heads.num_kv_heads, sizes.past)
        key = generator.standard_normal((*shape, site.heads.head_dim), np.float32)
        caches.append((key, generator.standard_normal((*shape, site.heads.value_head_dim), np.float32)))
    return _Case(sizes, lengths, tokens, caches)


def _source_inputs(case: _Case, row: int, roles: Roles, sites: list[AttentionSite]) -> dict[str, Array]:
    """One row by itself, without padding: not every exported graph is right for more than one row."""
    sizes = Sizes(1, int(case.lengths[row]), case.sizes.past)
    values = roles.feeds(sizes, np.ones((1, sizes.total), np.int64))
    values[roles.input_ids] = case.tokens[row : row + 1, : sizes.tokens]
    for site, (key, value) in zip(with_cache(sites), case.caches, strict=True):
        values[site.key.past] = roles.cache_array(site.key.past, sizes, key[row : row + 1])
        values[site.value.past] = roles.cache_array(site.value.past, sizes, value[row : row + 1])
    numpy_types = {ir.DataType.INT32: np.int32, ir.DataType.INT64: np.int64}
    return {
        str(value.name): array.astype(
            numpy_types.get(value.dtype or ir.DataType.FLOAT, array.dtype), copy=False
        )
        for value, array in values.items()
    }


def _columns(equalisers: Equalisers, layer: int) -> Array:
    """[G, 1, D] for a layer's keys [G, T, D]."""
    factors = equalisers.get(layer)
    return np.ones((1, 1, 1), np.float32) if factors is None else factors[:, None, :]


def _bundle_inputs(case: _Case, sites: list[AttentionSite], equalisers: Equalisers) -> dict[str, Array]:
    sizes = case.sizes
    heads = np.arange(sites[0].heads.num_query_heads, dtype=np.int32)
    positions = np.broadcast_to(np.arange(sizes.tokens, dtype=np.int64), case.tokens.shape)
    inputs: dict[str, Array] = {
        INPUT_IDS: case.tokens,
        LENGTHS: case.lengths,
        PAST_LENGTHS: np.full(sizes.batch, sizes.past, np.int32),
        OUTPUT_POSITIONS: positions.copy(),
        HEAD_MAP: np.broadcast_to(heads, (len(sites), sizes.batch, heads.size)).copy(),
        # A graph that has no such input leaves it.
        ROPE_LENGTHS: case.lengths + np.int32(sizes.past),
    }
    for window in {site.terms.window for site in sites}:
        inputs[page_table(window)] = np.arange(sizes.batch, dtype=np.int32)[:, None]  # a page a row
    room = ((0, 0), (0, 0), (0, sizes.tokens), (0, 0))
    for site, (key, value) in zip(with_cache(sites), case.caches, strict=True):
        stored = key / _columns(equalisers, site.layer)
        inputs[past_key(site.layer)] = np.pad(stored, room, constant_values=np.nan)
        inputs[past_value(site.layer)] = np.pad(value, room, constant_values=np.nan)
    return inputs


def _vocabulary(source: ir.Model) -> int:
    """A number of token ids that surely exist: the first 64 of any vocabulary, or its size if known."""
    for value in source.graph.outputs:
        if value.name == LOGITS and value.shape is not None and isinstance(value.shape[-1], int):
            return int(value.shape[-1])
    return 64


def _is_present(value: ir.Value, sites: list[AttentionSite]) -> bool:
    return any(value is cache.present for site in sites for cache in (site.key, site.value))
