"""A source ONNX file in ONNX Runtime: fed as its exporter meant it, in any batch and any chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError, reason
from chai_export.graph.match.find import Survey
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.match.site import with_cache
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.runtime.onnxruntime_model import GraphInMemory

_CACHE_BRANCH = "use_cache_branch"
_TYPES = {
    **{element.onnxruntime: element.numpy for element in ELEMENT_TYPES.values()},
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class SourceLogits:
    """Logits float32 [B, T, V], and the positions that have them, bool [T]: all, or ends of chunks."""

    logits: NDArray[np.float32]
    known: NDArray[np.bool_]


class SourceRun:
    """One graph of a source, opened.

    Args:
        graph: what to run.
        found: what its inputs and outputs are.

    Raises:
        ChaiError: ONNX Runtime cannot open it.
    """

    def __init__(self, graph: GraphInMemory, found: Survey) -> None:
        import onnxruntime as ort

        assert found.roles is not None
        self._graph = graph  # holds weights that the session reads
        self._roles: Roles = found.roles
        self._pairs = [
            (str(cache.past.name), str(cache.present.name), cache.past)
            for site in with_cache(found.sites)
            for cache in (site.key, site.value)
        ]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session: Any = graph.open(options)
        except Exception as error:  # onnxruntime raises types of its own that it does not export
            raise ChaiError(
                f"the source file cannot be run by ONNX Runtime ({reason(error)}), so nothing is compared "
                "with it; give the Hugging Face model as --reference"
            ) from error
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = [value.name for value in self._session.get_outputs()]
        presents = {present for _, present, _ in self._pairs}
        self._logits = next(name for name in outputs if name not in presents)
        self._outputs = [self._logits, *(present for _, present, _ in self._pairs)]

    def run(self, rows: NDArray[np.integer[Any]], chunks: Sequence[int]) -> SourceLogits:
        """Feed ``rows`` [B, T] in chunks that sum to T.

        Raises:
            ChaiError: ONNX Runtime fails.
        """
        batch, total = rows.shape
        caches = {past: self._empty(value, past, batch, total) for past, _, value in self._pairs}
        known = np.zeros(total, np.bool_)
        logits: NDArray[np.float32] | None = None
        start = 0
        for length in chunks:
            sizes = Sizes(batch, length, start)
            given = self._given(rows[:, start : start + length], sizes)
            try:
                results = self._session.run(self._outputs, {**given, **caches})
            except Exception as error:  # as above
                raise ChaiError(
                    f"the source file cannot be run by ONNX Runtime ({reason(error)}); "
                    "give the Hugging Face model as --reference"
                ) from error
            named = dict(zip(self._outputs, results, strict=True))
            part = named[self._logits].astype(np.float32).reshape(batch, -1, named[self._logits].shape[-1])
            end = start + length
            if logits is None:
                logits = np.zeros((batch, total, part.shape[-1]), np.float32)
            logits[:, end - part.shape[1] : end] = part  # of all tokens, or of the last one
            known[end - part.shape[1] : end] = True
            caches = {past: named[present] for past, present, _ in self._pairs}
            start = end
        assert logits is not None
        return SourceLogits(logits, known)

    def _empty(self, value: Any, name: str, batch: int, total: int) -> NDArray[Any]:
        heads, dim = self._roles.cache_sizes[value]
        known = self._inputs[name]
        width = known.shape[3] if isinstance(known.shape[3], int) else dim
        rows = (self._roles.capacity or total) if self._roles.fixed else 0
        return np.zeros((batch, heads, rows, width), _TYPES[known.type])

    def _given(self, tokens: NDArray[np.integer[Any]], sizes: Sizes) -> dict[str, NDArray[Any]]:
        """All inputs but the caches, in the types that the graph takes."""
        values = self._roles.feeds(sizes, np.ones((sizes.batch, sizes.total), np.int64))
        values[self._roles.input_ids] = np.asarray(tokens, np.int64)
        named = {str(value.name): array for value, array in values.items()}
        named[_CACHE_BRANCH] = np.array([sizes.past > 0])
        return {
            name: np.ascontiguousarray(named[name].astype(_TYPES[value.type]))
            for name, value in self._inputs.items()
            if name in named
        }
