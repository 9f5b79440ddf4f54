"""Drives a bundle's graph by hand in ONNX Runtime, with nothing of the package's runtime in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from chai_export.bundle.bundle import Bundle


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
        self.caches: dict[str, np.ndarray] = {}
        for layer in manifest.cache_layers:
            key = (batch, manifest.heads(heads)[layer], capacity, manifest.head_dim)
            value = (batch, manifest.num_kv_heads, capacity, manifest.value_head_dim)
            # Whatever stands beyond the lengths must not matter.
            self.caches[f"past_key.{layer}"] = np.full(key, np.nan, np.float32)
            self.caches[f"past_value.{layer}"] = np.full(value, np.nan, np.float32)

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
            "input_ids": ids,
            "lengths": lengths,
            "past_lengths": self.past_lengths,
            "output_positions": positions,
            "head_map": self.head_map,
            **self.caches,
        }
        names = [output.name for output in self.session.get_outputs()]
        results = dict(zip(names, self.session.run(None, feeds), strict=True))
        self.head_map = results["present_head_map"]
        for name in self.caches:
            self.caches[name] = results[name.replace("past", "present")]
        self.past_lengths = self.past_lengths + lengths
        return results["logits"]
