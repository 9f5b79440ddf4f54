"""A bundle on ONNX Runtime's CPU provider: rows in pages of pools that are bound once.

With the native library the op appends in place: each pool is one buffer, bound as past and as present.
Without it ONNX Runtime inlines the function body, which writes whole pools anew, so there are two sets of
buffers that swap roles; they hold the pages that were touched and grow by doubling. Layers with a window have
pools of their own, from which rows give pages back as they grow. Head maps are kept here by row and travel
with each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Heads
from chai_export.bundle.graph_io import (
    HEAD_MAP,
    INPUT_IDS,
    LENGTHS,
    LOGITS,
    OUTPUT_POSITIONS,
    PAST_LENGTHS,
    PRESENT_HEAD_MAP,
    ROPE_LENGTHS,
    CacheIO,
)
from chai_export.runtime.cache import Budget, KvCache, available_memory, memory_error
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library
from chai_export.runtime.onnxruntime_gpu import CacheDevice
from chai_export.runtime.onnxruntime_model import GraphInMemory, open_model, output_type, shared_value
from chai_export.runtime.pages import PAGE_LENGTH, PagePool
from chai_export.runtime.row_pages import PoolBytes, RowPages, Stack


class OnnxRuntimeSession:
    """The :class:`~chai_export.runtime.session.Session` of ONNX Runtime.

    Args:
        bundle: what to run.
        heads: "chai", or "all" for K caches with every KV head, which makes the same graph plain attention.
        threads: threads within an operator; 0 lets ONNX Runtime decide.
        spin_after: whether idle threads go on spinning after a step, for the sake of the next one soon.
        cache_memory: bytes that the pools may take; None for what is free.
        page_length: positions of a page.
        native: whether the compiled op is used where there is one; if not, the function body.
        graph: in place of the bundle's, see :func:`open_model`.
        gpu: likewise.

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
        cache_memory: int | None = None,
        page_length: int = PAGE_LENGTH,
        native: bool = True,
        graph: GraphInMemory | None = None,
        gpu: CacheDevice | None = None,
    ) -> None:
        self._manifest = bundle.manifest
        self._heads = heads
        self._cache_memory = cache_memory
        self.page_length = page_length
        self.library = find_library(ONNXRUNTIME_LIBRARY) if native else None
        self._graph = graph  # its weights are the session's
        self._session = open_model(bundle, self.library, threads, spin_after, graph, gpu)
        self._io = bundle.manifest.io
        self._logits_type = output_type(self._session, LOGITS)
        self._caches: list[KvCache] = []
        self._bindings: list[Any] = []
        self._turn = 0
        self._most_held: dict[int, int] = {}
        self._allocated: dict[int, int] = {}
        self._longest = 0
        self._per_page = self._page_bytes(heads)
        self._set_rows(0, self._no_pages())

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
        """Tokens that the row with the largest promise may have."""
        return self._longest

    @property
    def caches(self) -> list[KvCache]:
        """One set of buffers (in place) or two; the first holds the past of the next step."""
        return self._caches if self._turn == 0 else self._caches[::-1]

    @property
    def pool(self) -> PagePool:
        """The pages of the rows since :meth:`start` in layers without a window."""
        return self._pages.whole

    @property
    def pages(self) -> RowPages:
        """The same in all layers."""
        return self._pages

    @property
    def held_tokens(self) -> dict[int, int]:
        """Positions of the pages that rows held, by window; see :class:`.session.Session`."""
        return {window: pages * self.page_length for window, pages in self._most_held.items()}

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers: codes and scales of keys and values."""
        return sum(self._per_page.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools since :meth:`start`, touched or not."""
        return self._bytes_of({window: pool.pages for window, pool in self._pages.pools.items()})

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that are not free now."""
        return self._bytes_of(self._pages.held())

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages that were touched since :meth:`start`, or of both sets of buffers."""
        if self.in_place:
            return self._bytes_of({window: pool.touched for window, pool in self._pages.pools.items()})
        return sum(cache.nbytes for cache in self._caches)

    @property
    def head_map(self) -> NDArray[np.int32]:
        """int32 [L,B,H] by row (a copy)."""
        return self._head_map.copy()

    def budget(self, rows: int = 1, chunk: int = 0) -> tuple[int, Budget]:
        """Tokens that fit in a pool now, and what bounds them; see :class:`.session.Session`."""
        budget = self._memory()
        pages = self._sizes(chunk).most_pages(budget.size // self._buffers, rows)
        return pages * self.page_length, budget

    def start(self, rows: int, pages: int, chunk: int = 0, windows: int | None = None) -> None:
        """Begin anew with ``rows`` empty rows and pools; see :class:`.session.Session`."""
        self.drop()
        size = self._memory().size // self._buffers
        sizes = self._sizes(chunk).sizes_within(size, pages, rows if windows is None else windows)
        self._set_rows(rows, RowPages(sizes, self.page_length, chunk))
        self._allocate({w: n if self.in_place else min(n, rows) for w, n in sizes.items()})

    def begin(self, batch: int, capacity: int) -> None:
        """Begin anew with ``batch`` rows, each with a promise of ``capacity`` tokens.

        Raises:
            ChaiError: there is not enough memory.
        """
        self.drop()
        tokens, budget = self.budget()
        pages = batch * self.pool.count(capacity)
        if pages * self.page_length > tokens:
            needed = self._buffers * pages * self.page_bytes
            raise memory_error(batch, capacity, needed, budget)
        self.start(batch, pages)
        for row in range(batch):
            promised = self.promise(row, capacity)
            assert promised

    def drop(self) -> None:
        """Give the memory of the caches back."""
        self._bindings, self._caches = [], []
        self._turn = 0
        self._set_rows(0, self._no_pages())

    def promise(self, row: int, tokens: int) -> bool:
        """Promise a row room for ``tokens`` in all, if pages and memory for them are there."""
        needed = self._buffers * self._bytes_of(self._pages.untouched_after(row, tokens))
        if needed > available_memory():
            return False
        if not self._pages.promise(row, tokens):
            return False
        self._longest = max(self._longest, tokens)
        return True

    def release(self, row: int) -> None:
        """Take all pages from a row, whose text has ended."""
        self._pages.release(row)

    def adopt(self, row: int, stacks: Sequence[Stack], head_map: NDArray[np.int32]) -> None:
        """Begin a row with pages of another one that hold its first tokens; see :class:`.SharingSession`."""
        self._pages.adopt(row, stacks)
        self._head_map[:, row] = head_map

    def copy_page(self, stack: Stack, row: int, tokens: int) -> None:
        """Begin the last page of a row's first ``tokens`` with a copy of ``stack``."""
        self._extend(row, tokens, tokens)
        used = (tokens - 1) % self.page_length + 1
        for cache, target, page in self._last_pages(row, stack):
            array = self.caches[0].arrays[cache.past.name]
            array[target, :, :used] = array[page, :, :used]

    def _last_pages(self, row: int, stack: Stack) -> Iterator[tuple[CacheIO, int, int]]:
        """Each cache with its page of a row's last stack, and that of another stack."""
        pages = zip(self._pages.pools, self._pages.stacks_of(row)[-1], stack, strict=True)
        by_window = {window: (last, page) for window, last, page in pages}
        for cache in self._io.caches:
            yield (cache, *by_window[cache.window])

    def step(
        self,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        output_positions: NDArray[np.int64],
        rope_lengths: NDArray[np.int32] | None = None,
        rows: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Feed new tokens; see :meth:`chai_export.runtime.session.Session.step`."""
        of = np.arange(len(lengths)) if rows is None else np.asarray(rows, np.int64)
        totals = past_lengths + lengths
        fed: dict[str, NDArray[Any]] = {
            INPUT_IDS: input_ids,
            LENGTHS: lengths,
            PAST_LENGTHS: past_lengths,
            OUTPUT_POSITIONS: output_positions,
            ROPE_LENGTHS: totals if rope_lengths is None else rope_lengths,
        }
        active = np.flatnonzero(lengths > 0)
        if len(active) == len(lengths):
            return self._call(fed, of, totals)
        logits = np.zeros((*output_positions.shape, self._manifest.vocab_size), np.float32)
        if len(active):
            logits[active] = self._call({n: a[active] for n, a in fed.items()}, of[active], totals[active])
        return logits

    def _call(
        self, fed: dict[str, NDArray[Any]], rows: NDArray[np.int64], totals: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Run the graph on active rows."""
        for row, past, total in zip(rows.tolist(), fed[PAST_LENGTHS].tolist(), totals.tolist(), strict=True):
            self._extend(row, past, total)
        inputs = {**fed, **self._pages.tables(rows.tolist()), HEAD_MAP: self._head_map[:, rows]}
        binding = self._bindings[self._turn]
        for value in (*self._io.step, self._io.head_map):
            binding.bind_ortvalue_input(value.name, shared_value(np.ascontiguousarray(inputs[value.name])))
        logits = np.empty((*fed[OUTPUT_POSITIONS].shape, self._manifest.vocab_size), self._logits_type)
        maps = np.empty_like(inputs[HEAD_MAP], order="C")
        binding.bind_ortvalue_output(LOGITS, shared_value(logits))
        binding.bind_ortvalue_output(PRESENT_HEAD_MAP, shared_value(maps))
        self._session.run_with_iobinding(binding)
        self._head_map[:, rows] = maps
        self._turn = (self._turn + 1) % len(self._bindings)
        return logits.astype(np.float32, copy=False)

    def _extend(self, row: int, past: int, tokens: int) -> None:
        """Take pages for a row, and memory for them where the buffers grow with what was touched."""
        self._pages.extend(row, past, tokens)
        held = self._pages.held()
        if self._bytes_of(held) > self._bytes_of(self._most_held):
            self._most_held = held
        if self.in_place:
            return
        pools, has = self._pages.pools, self._allocated
        if any(pools[window].touched > has[window] for window in pools):
            self._grow({w: min(pool.pages, max(pool.touched, 2 * has[w])) for w, pool in pools.items()})

    @property
    def _buffers(self) -> int:
        return 1 if self.in_place else 2

    def _page_bytes(self, heads: Heads | str) -> dict[int, int]:
        """Of a page in each pool, first that of the layers without a window, whether there are any or not."""
        by_window = {0: 0, **self._manifest.kv_bytes_by_window(heads)}
        return {window: item * self.page_length for window, item in by_window.items()}

    def _memory(self) -> Budget:
        """What all pools may take."""
        return Budget.now(self._cache_memory)

    def _sizes(self, chunk: int) -> PoolBytes:
        return PoolBytes(self._per_page, self.page_length, chunk)

    def _bytes_of(self, pages: Mapping[int, int]) -> int:
        return sum(self._per_page[window] * count for window, count in pages.items())

    def _no_pages(self) -> RowPages:
        return RowPages(dict.fromkeys(self._per_page, 0), self.page_length)

    def _set_rows(self, rows: int, pages: RowPages) -> None:
        manifest = self._manifest
        self._pages = pages
        self._most_held = dict.fromkeys(self._per_page, 0)
        self._longest = 0
        self._head_map = np.zeros((manifest.num_layers, rows, manifest.num_query_heads), np.int32)

    def _allocate(self, pages: dict[int, int]) -> None:
        self._allocated = pages
        self._caches = [
            KvCache(self._manifest, self._heads, pages, self.page_length) for _ in range(self._buffers)
        ]
        self._turn = 0
        self._bind()

    def _grow(self, pages: dict[int, int]) -> None:
        """Larger buffers with the pages that there are; out of place a call copies all of them anyway."""
        past = self.caches[0]
        self._bindings, self._caches = [], []  # the other set's memory is given back first
        self._allocate(pages)
        for name, array in past.arrays.items():
            self._caches[0].arrays[name][: len(array)] = array

    def _bind(self) -> None:
        """A binding for each set of buffers that can be the past."""
        self._bindings = []
        values = [{name: shared_value(a) for name, a in cache.arrays.items()} for cache in self._caches]
        for turn, past in enumerate(values):
            present = values[(turn + 1) % len(values)]
            binding = self._session.io_binding()
            for cache in self._io.caches:
                binding.bind_ortvalue_input(cache.past.name, past[cache.past.name])
                binding.bind_ortvalue_output(cache.present.name, present[cache.past.name])
            self._bindings.append(binding)
