"""A bundle on ONNX Runtime's CPU provider, with caches that are bound once and never copied by us.

With the native library the op appends in place: each cache is one buffer, bound as past and as present.
Without it ONNX Runtime inlines the function body, which reads the whole past while it writes the whole
present, so there are two sets of buffers that swap roles. The head map always has two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Heads
from chai_export.bundle.graph_io import HEAD_MAP, LOGITS, PRESENT_HEAD_MAP
from chai_export.runtime.cache import KvCache
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library
from chai_export.runtime.onnxruntime_model import GraphInMemory, open_model, output_type, shared_value


class OnnxRuntimeSession:
    """The :class:`~chai_export.runtime.session.Session` of ONNX Runtime.

    Args:
        bundle: what to run.
        heads: "chai", or "all" for K caches with every KV head, which makes the same graph plain attention.
        threads: threads within an operator; 0 lets ONNX Runtime decide.
        spin_after: whether idle threads go on spinning after a step, for the sake of the next one soon.
        native: whether the compiled op is used where there is one; if not, the function body.
        graph: in place of the bundle's, see :func:`open_model`.

    Raises:
        ChaiError: the bundle is bfloat16, or its graph does not fit its manifest or ONNX Runtime.
    """

    def __init__(
        self,
        bundle: Bundle,
        heads: Heads | str = Heads.CHAI,
        *,
        threads: int = 0,
        spin_after: bool = True,
        native: bool = True,
        graph: GraphInMemory | None = None,
    ) -> None:
        self._manifest = bundle.manifest
        self._heads = heads
        self.library = find_library(ONNXRUNTIME_LIBRARY) if native else None
        self._graph = graph  # its weights are the session's
        self._session = open_model(bundle, self.library, threads, spin_after, graph)
        self._io = bundle.manifest.io
        self._logits_type = output_type(self._session, LOGITS)
        self._caches: list[KvCache] = []
        self._bindings: list[Any] = []
        self._head_maps: list[NDArray[np.int32]] = []
        self._turn = 0

    @property
    def in_place(self) -> bool:
        """Whether past and present share their buffers."""
        return self.library is not None

    @property
    def bounded_scratch(self) -> bool:
        """The native kernel works in blocks; the function body makes whole score matrices."""
        return self.library is not None

    @property
    def capacity(self) -> int:
        """Tokens that fit in each row of the caches; 0 before :meth:`begin`."""
        return self._caches[0].capacity if self._caches else 0

    @property
    def caches(self) -> list[KvCache]:
        """One set of buffers (in place) or two; the first holds the past of the next step."""
        return self._caches if self._turn == 0 else self._caches[::-1]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all cache buffers."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def head_map(self) -> NDArray[np.int32]:
        """int32 [L,B,H] after the last step (a copy)."""
        return self._head_maps[self._turn].copy()

    def begin(self, batch: int, capacity: int) -> None:
        """Allocate for ``batch`` empty rows of ``capacity`` tokens.

        Raises:
            ChaiError: there is not enough memory.
        """
        shape = (self._manifest.num_layers, batch, self._manifest.num_query_heads)
        self._drop()
        self._caches = [self._new_cache(batch, capacity) for _ in range(1 if self.in_place else 2)]
        self._head_maps = [np.zeros(shape, np.int32) for _ in range(2)]
        self._turn = 0
        self._bind()

    def grow(self, capacity: int) -> None:
        """Enlarge the caches to ``capacity`` tokens, keeping their content.

        Raises:
            ChaiError: there is not enough memory.
        """
        old = self.caches[0]
        # The second set of buffers holds nothing yet: its memory is given back before more is asked for.
        self._drop()
        larger = self._new_cache(old.batch, capacity)
        larger.copy_from(old)
        del old
        self._caches = [larger]
        if not self.in_place:
            self._caches.append(self._new_cache(larger.batch, capacity))
        self._head_maps = self._head_maps[self._turn :] + self._head_maps[: self._turn]
        self._turn = 0
        self._bind()

    def step(
        self,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        output_positions: NDArray[np.int64],
        rope_lengths: NDArray[np.int32] | None = None,
    ) -> NDArray[np.float32]:
        """Feed new tokens; see :meth:`chai_export.runtime.session.Session.step`."""
        assert np.all((lengths == 0) | (past_lengths + lengths <= self.capacity))
        binding = self._bindings[self._turn]
        arrays = [input_ids, lengths, past_lengths, output_positions]
        if self._manifest.switch_lengths:
            arrays.append(past_lengths + lengths if rope_lengths is None else rope_lengths)
        for value, array in zip(self._io.step, arrays, strict=True):
            binding.bind_ortvalue_input(value.name, shared_value(np.ascontiguousarray(array)))
        logits = np.empty((*output_positions.shape, self._manifest.vocab_size), self._logits_type)
        binding.bind_ortvalue_output(LOGITS, shared_value(logits))
        self._session.run_with_iobinding(binding)
        self._turn = 1 - self._turn
        return logits.astype(np.float32, copy=False)

    def _new_cache(self, batch: int, capacity: int) -> KvCache:
        return KvCache(self._manifest, self._heads, batch, capacity)

    def _drop(self) -> None:
        self._bindings, self._caches = [], []

    def _bind(self) -> None:
        """One binding per turn: the head maps swap roles every step, the caches too unless in place."""
        self._bindings = []
        values = [{name: shared_value(a) for name, a in cache.arrays.items()} for cache in self._caches]
        maps = [shared_value(array) for array in self._head_maps]
        for turn in range(2):
            binding = self._session.io_binding()
            past, present = values[turn % len(values)], values[(turn + 1) % len(values)]
            for cache in self._io.caches:
                binding.bind_ortvalue_input(cache.past.name, past[cache.past.name])
                binding.bind_ortvalue_output(cache.present.name, present[cache.past.name])
            binding.bind_ortvalue_input(HEAD_MAP, maps[turn])
            binding.bind_ortvalue_output(PRESENT_HEAD_MAP, maps[1 - turn])
            self._bindings.append(binding)
