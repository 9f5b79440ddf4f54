"""Attention of one row by a head map: probabilities with windows, soft caps, sinks and slopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op.attributes import Attributes

Tensor = NDArray[Any]
Int32Array = NDArray[np.int32]
Float = type[np.floating[Any]]


@dataclass(frozen=True)
class Visible:
    """The cache rows of one row of the batch that its new tokens may see, positions ``start`` … n+m-1.

    ``keys`` are [R, positions, D] and ``values`` [G, positions, Dv], dequantised.
    """

    start: int
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class HeadTerms:
    """What is added per query head: ``sinks`` and ``slopes`` [H], or None."""

    sinks: Tensor | None
    slopes: Tensor | None


def probabilities(
    scores: Tensor, first_query: int, first_key: int, attributes: Attributes, terms: HeadTerms, head: int
) -> Tensor:
    """Softmax of one head's scaled scores [m, positions], in their dtype; zeros where a token sees nothing.

    Args:
        scores: query·key times the scale.
        first_query: position of the first query token; the others follow it.
        first_key: position of the first key.
        attributes: window and soft cap.
        terms: sinks and slopes.
        head: the query head whose sink and slope count.
    """
    dtype = scores.dtype.type
    query = np.arange(first_query, first_query + scores.shape[0])[:, None]
    key = np.arange(first_key, first_key + scores.shape[1])[None, :]
    if attributes.softcap:
        cap = dtype(attributes.softcap)
        scores = cap * np.tanh(scores / cap)
    if terms.slopes is not None:
        scores = scores + terms.slopes[head].astype(dtype) * (key - query).astype(dtype)
    seen = key <= query
    if attributes.window:
        seen &= key > query - attributes.window
    masked = np.where(seen, scores, dtype(-np.inf))
    largest = masked.max(axis=-1, keepdims=True, initial=-np.inf)
    sink = None if terms.sinks is None else terms.sinks[head].astype(dtype)
    if sink is not None:
        largest = np.maximum(largest, sink)
    weights = np.exp(masked - largest)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - largest)
    result: Tensor = weights / total
    return result


def probe_probabilities(
    query: Tensor, key: Tensor, attributes: Attributes, terms: HeadTerms
) -> NDArray[np.float32]:
    """Exact probabilities of the first t tokens of a fresh row: float32 [H, t, t].

    Args:
        query: [H, t, D].
        key: [G, t, D].
        attributes: scale, window and soft cap.
        terms: sinks and slopes.
    """
    group = query.shape[0] // key.shape[0]
    factor = np.float32(attributes.factor(query.shape[2]))
    return np.stack(
        [
            probabilities(_scores(query[h], key[h // group], np.float32) * factor, 0, 0, attributes, terms, h)
            for h in range(query.shape[0])
        ]
    )


def attend_row(
    query: Tensor,
    probe_key: Tensor,
    probe_value: Tensor,
    past: int,
    visible: Visible,
    head_map: Int32Array,
    slots: Mapping[int, int],
    attributes: Attributes,
    terms: HeadTerms,
    compute_dtype: Float,
) -> Tensor:
    """Step 5 of the op for one active row, its new tokens being in the caches already.

    Args:
        query: T [H, m, D], valid new tokens.
        probe_key: T [G, e, D], keys of the first e tokens, which are exact; e is 0 unless the row is fresh.
        probe_value: T [G, e, Dv].
        past: n.
        visible: the cache rows.
        head_map: int32 [H].
        slots: KV head to slot of the K cache.
        attributes: of the node.
        terms: sinks and slopes.
        compute_dtype: arithmetic of scores and products.

    Returns:
        T [m, H*Dv].
    """
    num_heads, new, head_dim = query.shape
    group = num_heads // visible.values.shape[0]
    exact, width = probe_key.shape[1], visible.values.shape[2]
    factor = compute_dtype(attributes.factor(head_dim))
    output = np.empty((new, num_heads * width), dtype=query.dtype)
    for h in range(num_heads):
        columns = slice(h * width, (h + 1) * width)
        representative = int(head_map[h])
        keys = visible.keys[slots[representative // group]]
        scores = _scores(query[representative, exact:], keys, compute_dtype) * factor
        p = probabilities(scores, past + exact, visible.start, attributes, terms, h)
        output[exact:, columns] = (p @ visible.values[h // group].astype(compute_dtype)).astype(query.dtype)
        scores = _scores(query[h, :exact], probe_key[h // group], compute_dtype) * factor
        p = probabilities(scores, 0, 0, attributes, terms, h)
        output[:exact, columns] = (p @ probe_value[h // group].astype(compute_dtype)).astype(query.dtype)
    return output


def _scores(query: Tensor, keys: Tensor, dtype: Float) -> Tensor:
    product: Tensor = query.astype(dtype) @ keys.astype(dtype).T
    return product
