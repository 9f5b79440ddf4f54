"""A bundle on ONNX Runtime's CUDA provider: pools of pages on the GPU, where they stay."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Heads
from chai_export.bundle.graph_io import PAGE_LENGTH as PAGE_LENGTH_NAME
from chai_export.bundle.graph_io import kept_sizes, pool_pages
from chai_export.errors import ChaiError, reason
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.runtime.cache import Budget
from chai_export.runtime.onnxruntime_gpu import CacheDevice
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.pages import PAGE_LENGTH
from chai_export.runtime.row_pages import Stack
from chai_export.units import bytes_text


class OnnxRuntimeGpuSession(OnnxRuntimeSession):
    """The :class:`~chai_export.runtime.session.Session` of ONNX Runtime's CUDA provider.

    A pool is allocated when a batch begins, for all that its rows may need; tokens, maps and logits travel.

    Args:
        bundle: what to run.
        heads: "chai", or "all" for K caches with every KV head, which makes the same graph plain attention.
        gpu: where caches lie, and its kernels.
        threads: of operators that stay on the CPU; 0 lets ONNX Runtime decide.
        cache_memory: bytes that the pools may take; None for what is free.
        page_length: positions of a page.

    Raises:
        ChaiError: ONNX Runtime cannot use the GPU, or as :class:`OnnxRuntimeSession`.
    """

    def __init__(
        self,
        bundle: Bundle,
        heads: Heads | str,
        gpu: CacheDevice,
        *,
        threads: int = 0,
        cache_memory: int | None = None,
        page_length: int = PAGE_LENGTH,
    ) -> None:
        self._gpu = gpu
        self._pools: dict[str, Any] = {}
        super().__init__(
            bundle, heads, threads=threads, cache_memory=cache_memory, page_length=page_length, gpu=gpu
        )

    @property
    def in_place(self) -> bool:
        """The op appends to the caches it is given."""
        return True

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pools."""
        return self._bytes_of(self._allocated) if self._pools else 0

    def drop(self) -> None:
        """Give the memory of the caches back."""
        super().drop()
        self._pools = {}

    def promise(self, row: int, tokens: int) -> bool:
        """Promise a row room for ``tokens`` in all, if pages for them are there."""
        if not self._pages.promise(row, tokens):
            return False
        self._longest = max(self._longest, tokens)
        return True

    def copy_page(self, stack: Stack, row: int, tokens: int) -> None:
        """Begin the last page of a row's first ``tokens`` with a copy of ``stack``."""
        self._extend(row, tokens, tokens)
        for cache, target, page in self._last_pages(row, stack):
            pool = self._pools[cache.past.name]  # whole: what lies past the tokens is undefined anyway
            size = pool.tensor_size_in_bytes() // self._allocated[cache.window]
            address = pool.data_ptr()
            self._gpu.copy(address + target * size, address + page * size, size)

    def _memory(self) -> Budget:
        return Budget.now(self._cache_memory, self._gpu.free_memory(), "GPU memory")

    def _allocate(self, pages: dict[int, int]) -> None:
        self._allocated = pages
        sizes = {PAGE_LENGTH_NAME: self.page_length}
        sizes |= {pool_pages(window): count for window, count in pages.items()}
        sizes |= kept_sizes(self._manifest.heads(self._heads))
        binding = self._session.io_binding()
        for cache in self._io.caches:
            shape, dtype = cache.past.shape(sizes), ELEMENT_TYPES[cache.past.dtype].numpy
            try:
                pool = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._gpu.device, 0)
            except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
                size = bytes_text(self._bytes_of(pages))
                raise ChaiError(
                    f"KV caches of {size} do not fit in GPU memory ({reason(error)}); lower "
                    "--cache-memory or --max-seq, or give shorter or fewer prompts"
                ) from error
            binding.bind_ortvalue_input(cache.past.name, pool)
            binding.bind_ortvalue_output(cache.present.name, pool)
            self._pools[cache.past.name] = pool
        self._bindings, self._turn = [binding], 0
