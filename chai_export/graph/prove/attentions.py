"""Proof of each attention by itself: the source's nodes against one node of ours at R = G.

The source's attention is cut out from query, new key and new value to its output and the joined caches. Both
run in float32 on random data: a fresh batch with a padded row, a chunk after a past, one decoded token. This
covers scale, mask, cache axis, transposes and how query heads share KV heads, whatever the size of the model.
An attention that reads an earlier layer's cache is given the caches as that layer leaves them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.match.site import AttentionSite, RightPadding, ScoreTerms
from chai_export.graph.prove.evaluate import Array, EvaluationError, cut, session
from chai_export.op.attributes import Attributes
from chai_export.op.model import node_model
from chai_export.op.schema import OP_TYPE, SHARED_OP_TYPE

_LONGEST_FRESH = 256
TOLERANCE = 2e-5
"""Of outputs that are averages of standard normal numbers, in float32."""

_CASES: dict[RightPadding, tuple[tuple[Sizes, int], ...]] = {
    RightPadding.ANYWHERE: ((Sizes(2, 5, 0), 2), (Sizes(2, 4, 3), 1), (Sizes(2, 1, 6), 0)),
    RightPadding.FRESH: ((Sizes(2, 5, 0), 2), (Sizes(1, 4, 3), 0), (Sizes(2, 1, 6), 0)),
    RightPadding.NOWHERE: ((Sizes(2, 5, 0), 0), (Sizes(2, 4, 3), 0), (Sizes(2, 1, 6), 0)),
}
"""By where the source takes right padding: sizes, and how many tokens of the last row are padding."""


@dataclass
class SiteProver:
    """Compares sites of one graph with the op in exact storage, a page for each row.

    ``max_abs_diff`` is the largest difference seen so far.
    """

    graph: ir.Graph
    roles: Roles
    probe_tokens: int
    max_abs_diff: float = 0.0

    def prove(self, sites: Iterable[AttentionSite]) -> None:
        """Compare every site.

        Raises:
            ChaiError: one differs; names its layer.
        """
        ours: dict[tuple[str, float, ScoreTerms], Any] = {}
        for site in sites:
            node = (_op_type(site), site.scale, site.terms)
            if node not in ours:
                ours[node] = self._our_session(*node)
            try:
                self._prove(site, ours[node])
            except EvaluationError as error:
                raise ChaiError(
                    f"layer {site.layer}: the attention cannot be run by itself to prove the rewrite "
                    f"({error}); export the model again with another opset"
                ) from error

    def _our_session(self, op_type: str, scale: float, terms: ScoreTerms) -> Any:
        opset = self.graph.opset_imports[""]
        stored = Attributes(scale, self.probe_tokens, window=terms.window, softcap=terms.softcap)
        model = node_model(
            stored,
            "float32",
            sinks=terms.sinks is not None,
            slopes=terms.slopes is not None,
            opset=opset,
            op_type=op_type,
        )
        return session(ir.serde.deserialize_model(model))

    def _prove(self, site: AttentionSite, ours: Any) -> None:
        leaves = [site.query, site.key.new, site.value.new]
        presents = [site.key.present, site.value.present] if site.source_layer is None else []
        part = cut(self.graph, leaves, [site.output, *presents], self.roles)
        generator = np.random.default_rng(site.layer)
        for wanted, padded in (*_CASES[site.right_padding], *self._past_the_window(site)):
            sizes = self.roles.fit(wanted)
            if not site.chunks and sizes.past and sizes.tokens > 1:
                continue
            lengths = np.full(sizes.batch, sizes.tokens, np.int32)
            lengths[-1] -= padded
            arrays = _random_arrays(site, sizes, generator)
            theirs = part.run(self.roles, sizes, self._feeds(site, sizes, lengths, arrays))
            inputs = _op_inputs(site, sizes, lengths, arrays)
            mine = ours.run(None, {each.name: inputs[each.name] for each in ours.get_inputs()})
            difference = _largest_difference(theirs, mine, sizes, lengths)
            self.max_abs_diff = max(self.max_abs_diff, difference)
            if not difference <= TOLERANCE:
                raise ChaiError(
                    f"layer {site.layer}: the attention at node {site.anchor.name!r} computes something else "
                    f"than causal attention{site.terms.describe()} (outputs differ by {difference:.3g} at "
                    f"{sizes.tokens} tokens after {sizes.past}); choose another model"
                )

    def _past_the_window(self, site: AttentionSite) -> list[tuple[Sizes, int]]:
        """Sizes at which the window of a site hides something, as far as a fixed cache has room for them."""
        window, room = site.terms.window, self.roles.capacity
        if not window:
            return []
        sizes = [Sizes(1, 1, past) for past in (window - 1, window, window + 1) if past > 0]
        sizes += [Sizes(1, 4, max(1, window - 2)), Sizes(1, min(window, _LONGEST_FRESH) + 2, 0)]
        return [(each, 0) for each in sizes if room is None or each.total <= room]

    def _feeds(
        self, site: AttentionSite, sizes: Sizes, lengths: Array, arrays: dict[str, Array]
    ) -> dict[ir.Value, Array]:
        valid = np.arange(sizes.total) < sizes.past + lengths[:, None]
        return {
            **self.roles.feeds(sizes, valid.astype(np.int64)),
            site.query: arrays["query"],
            site.key.new: arrays["key"],
            site.value.new: arrays["value"],
            site.key.past: self.roles.cache_array(site.key.past, sizes, arrays["past_key"]),
            site.value.past: self.roles.cache_array(site.value.past, sizes, arrays["past_value"]),
        }


def _random_arrays(site: AttentionSite, sizes: Sizes, generator: np.random.Generator) -> dict[str, Array]:
    kv, dim, value_dim = site.heads.num_kv_heads, site.heads.head_dim, site.heads.value_head_dim
    shapes = {
        "query": (sizes.batch, site.heads.num_query_heads, sizes.tokens, dim),
        "key": (sizes.batch, kv, sizes.tokens, dim),
        "value": (sizes.batch, kv, sizes.tokens, value_dim),
        "past_key": (sizes.batch, kv, sizes.past, dim),
        "past_value": (sizes.batch, kv, sizes.past, value_dim),
    }
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _op_type(site: AttentionSite) -> str:
    return OP_TYPE if site.source_layer is None else SHARED_OP_TYPE


def _op_inputs(
    site: AttentionSite, sizes: Sizes, lengths: Array, arrays: dict[str, Array]
) -> dict[str, Array]:
    """The same data for the op, its caches with room for the new rows and NaN where nothing is stored.

    For a site that reads another layer's cache the new rows are in them.
    """
    room = ((0, 0), (0, 0), (0, sizes.tokens), (0, 0))
    heads = np.arange(site.heads.num_query_heads, dtype=np.int32)
    identity = np.broadcast_to(heads, (sizes.batch, heads.size)).copy()
    key_cache, value_cache = (
        np.pad(arrays[name], room, constant_values=np.nan) for name in ("past_key", "past_value")
    )
    if site.source_layer is not None:
        key_cache = _appended(key_cache, arrays["key"], sizes, lengths)
        value_cache = _appended(value_cache, arrays["value"], sizes, lengths)
    return {
        **arrays,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "page_table": np.arange(sizes.batch, dtype=np.int32)[:, None],
        "kept_head_map": identity,
        "past_head_map": identity,
        "past_lengths": np.full(sizes.batch, sizes.past, np.int32),
        "lengths": lengths,
        "sinks": np.array(site.terms.sinks or (), np.float32),
        "alibi_slopes": np.array(site.terms.slopes or (), np.float32),
    }


def _appended(cache: Array, new: Array, sizes: Sizes, lengths: Array) -> Array:
    result = cache.copy()
    for row, valid in enumerate(lengths):
        result[row, :, sizes.past : sizes.past + valid] = new[row, :, :valid]
    return result


def _largest_difference(theirs: list[Array], mine: list[Array], sizes: Sizes, lengths: Array) -> float:
    """Over valid tokens of the output and valid rows of both caches; NaN counts as infinite."""
    output = theirs[0].transpose(0, 2, 1, 3).reshape(sizes.batch, sizes.tokens, -1)
    if output.shape != mine[0].shape:
        return float("inf")
    largest = 0.0
    for row in range(sizes.batch):
        valid = int(lengths[row])
        pairs = [(output[row, :valid], mine[0][row, :valid])]
        end = sizes.past + valid
        # An attention without a cache gives its output and map only; the caches are their owner's to prove.
        pairs += [(a[row, :, :end], b[row, :, :end]) for a, b in zip(theirs[1:], mine[1:-1], strict=True)]
        for a, b in pairs:
            difference = float(np.max(np.abs(a - b), initial=0.0)) if a.shape == b.shape else float("inf")
            largest = max(largest, difference if np.isfinite(difference) else float("inf"))
    return largest
