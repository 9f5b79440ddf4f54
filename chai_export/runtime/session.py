"""What the generation loop needs of a backend, and which backends there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.errors import ChaiError
from chai_export.runtime.cache import Budget
from chai_export.runtime.pages import PagePool
from chai_export.runtime.row_pages import RowPages, Stack


class Session(Protocol):
    """One loaded model whose rows hold pages of a pool. Calls are not thread-safe."""

    page_length: int

    @property
    def capacity(self) -> int:
        """Tokens that the row with the largest promise may have."""
        ...

    @property
    def head_map(self) -> NDArray[np.int32]:
        """int32 [L,B,H]: query head to representative, after the last step (a copy)."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of cache memory held now, whatever of it is in use."""
        ...

    @property
    def held_tokens(self) -> dict[int, int]:
        """Positions of the pages that rows held since :meth:`start`, when those took most memory: in the
        layers of each window, 0 for those without one."""
        ...

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers."""
        ...

    @property
    def pool(self) -> PagePool:
        """The pages of the rows since :meth:`start` in layers without a window."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether a step appends to the caches where they lie; if not, there are two sets of them."""
        ...

    @property
    def bounded_scratch(self) -> bool:
        """Whether attention needs no memory that grows with new tokens times capacity."""
        ...

    def budget(self, rows: int = 1, chunk: int = 0) -> tuple[int, Budget]:
        """Tokens that fit in a pool now, in whole pages, with what bounds them.

        Beside them layers with a window hold that of so many rows, which feed up to ``chunk`` tokens in a
        call; where it is 0 any number, so that they hold all tokens too.

        Called with no pool there, or for its second part alone: what a pool holds counts as taken.
        """
        ...

    def drop(self) -> None:
        """Give the memory of the caches back."""
        ...

    def start(self, rows: int, pages: int, chunk: int = 0, windows: int | None = None) -> None:
        """Begin anew with ``rows`` empty rows that were promised nothing, and a pool of so many pages.

        Args:
            rows: that there are.
            pages: of the layers without a window.
            chunk: as for :meth:`budget`.
            windows: rows whose windows have room in layers with one, as far as memory goes; default: all.
        """
        ...

    def begin(self, batch: int, capacity: int) -> None:
        """Begin anew with ``batch`` empty rows, each with a promise of ``capacity`` tokens."""
        ...

    def promise(self, row: int, tokens: int) -> bool:
        """Promise a row room for ``tokens`` in all, if pages and memory for them are there."""
        ...

    def release(self, row: int) -> None:
        """Take all pages from a row, whose text has ended."""
        ...

    def step(
        self,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        output_positions: NDArray[np.int64],
        rope_lengths: NDArray[np.int32] | None = None,
        rows: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Feed new tokens to some rows: line b of every argument is row ``rows[b]``.

        Args:
            input_ids: int64 [B,S], padded on the right.
            lengths: int32 [B], valid tokens of each row; 0 leaves a row alone.
            past_lengths: int32 [B], tokens already in the cache; 0 starts a row afresh.
            output_positions: int64 [B,N], which of the S tokens want logits.
            rope_lengths: int32 [B], tokens of each row's whole text, those of later steps of the same prefill
                included: they choose the rotary factors of bundles that have several sets, and must be on one
                side of a switch length as long as a cache is kept. Default: the tokens fed so far.
            rows: default: all.

        Returns:
            float32 [B,N,V]; undefined for rows that were left alone.
        """
        ...


class SharingSession(Session, Protocol):
    """A session whose rows may begin with pages of other rows, as those of a server do."""

    @property
    def pages(self) -> RowPages:
        """The pages of the rows since :meth:`start` in all layers."""
        ...

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools, whatever of them was touched."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that are not free."""
        ...

    def adopt(self, row: int, stacks: Sequence[Stack], head_map: NDArray[np.int32]) -> None:
        """Begin a row with the first whole pages of another one, and its head map, int32 [L,H].

        The stacks hold at least the probe and what the next token sees, and are held by a row or retained.
        """
        ...

    def copy_page(self, stack: Stack, row: int, tokens: int) -> None:
        """Extend a row to its first ``tokens``, whose last page begins as a copy of ``stack``."""
        ...


def require_heads(bundle: Bundle, heads: Heads) -> None:
    """Raise unless a bundle has the heads that it is to run with.

    Raises:
        ChaiError: all are wanted, and some were cut away.
    """
    if heads is Heads.ALL and bundle.manifest.static is not None:
        raise ChaiError(
            f"{bundle.path} has static membership: the heads it does not keep were cut away; use heads chai, "
            "or export with --membership online"
        )


def open_session(bundle: Bundle, backend: Backend | str, heads: Heads | str, **options: Any) -> Session:
    """Load ``bundle`` with a backend; ``heads`` is "chai" or "all" (same graph, R = G).

    Raises:
        UsageError: the backend or the mode is unknown.
        ChaiError: the backend cannot run this bundle.
    """
    backend, heads = Backend(backend), Heads(heads)
    if backend is Backend.TENSORRT:
        from chai_export.runtime.tensorrt_session import open_tensorrt_session

        return open_tensorrt_session(bundle, heads, cache_memory=options.get("cache_memory"))
    from chai_export.runtime.onnxruntime_gpu import gpu_for
    from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession

    gpu = gpu_for(bundle) if options.keys() <= {"threads", "cache_memory"} else None
    if gpu is not None:
        from chai_export.runtime.onnxruntime_gpu_session import OnnxRuntimeGpuSession

        return OnnxRuntimeGpuSession(bundle, heads, gpu, **options)
    return OnnxRuntimeSession(bundle, heads, **options)
