"""Drives a bundle's graph by hand in ONNX Runtime, with nothing of the package's runtime in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.graph_io import (
    HEAD_MAP,
    INPUT_IDS,
    LENGTHS,
    LOGITS,
    OUTPUT_POSITIONS,
    PAGE_LENGTH,
    PAST_LENGTHS,
    PRESENT_HEAD_MAP,
    kept_sizes,
    page_table,
    pool_sizes,
)
from chai_export.op.dtypes import ELEMENT_TYPES


def _filled(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, np.nan if dtype.kind == "f" else 85, dtype)


class GraphRunner:
    """Caches and lengths of one batch; ``heads`` is "chai" or "all"."""

    def __init__(self, bundle: Bundle, batch: int, capacity: int, heads: str = "all") -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            str(bundle.model_path), options, providers=["CPUExecutionProvider"]
        )
        manifest = bundle.manifest
        self.batch = batch
        self.past_lengths = np.zeros(batch, np.int32)
        query_heads = np.arange(manifest.num_query_heads, dtype=np.int32)
        shape = (manifest.num_layers, batch, manifest.num_query_heads)
        self.head_map = np.broadcast_to(query_heads, shape).copy()
        # Two short pages a row, in any order.
        self.table = np.arange(2 * batch, dtype=np.int32)[::-1].reshape(batch, 2)
        pages = {**pool_sizes(manifest.io, 2 * batch), PAGE_LENGTH: -(-capacity // 2)}
        sizes = {**pages, **kept_sizes(manifest.heads(heads))}
        self._pairs = [(cache.past.name, cache.present.name) for cache in manifest.io.caches]
        # Whatever stands beyond the lengths must not matter.
        self.caches = {
            cache.past.name: _filled(cache.past.shape(sizes), ELEMENT_TYPES[cache.past.dtype].numpy)
            for cache in manifest.io.caches
        }
        self._windows = manifest.cache_windows
        self._takes = {value.name for value in manifest.io.inputs}

    def step(self, rows: Sequence[Sequence[int]], positions: np.ndarray | None = None) -> np.ndarray:
        """Feed new tokens of each row, padded on the right; logits [B, N, V] (all tokens by default)."""
        width = max(len(row) for row in rows)
        ids = np.zeros((self.batch, width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        if positions is None:
            positions = np.broadcast_to(np.arange(width), (self.batch, width)).astype(np.int64)
        feeds = {
            INPUT_IDS: ids,
            LENGTHS: lengths,
            PAST_LENGTHS: self.past_lengths,
            OUTPUT_POSITIONS: positions,
            HEAD_MAP: self.head_map,
            **{page_table(window): self.table for window in self._windows},
            **self.caches,
        }
        feeds = {name: array for name, array in feeds.items() if name in self._takes}
        names = [output.name for output in self.session.get_outputs()]
        results = dict(zip(names, self.session.run(None, feeds), strict=True))
        self.head_map = results[PRESENT_HEAD_MAP]
        for past, present in self._pairs:
            self.caches[past] = results[present]
        self.past_lengths = self.past_lengths + lengths
        return results[LOGITS]
