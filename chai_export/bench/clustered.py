"""The op on a problem: its caches as pools of pages, in the precision asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bench.op_session import OpSession
from chai_export.bench.problem import Problem
from chai_export.op.attributes import Attributes
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.op.storage import Storage
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

Tensor = NDArray[Any]
PAGE_LENGTH = 128
_STEP = 1024


def clustered_head_attention(
    problem: Problem,
    kept: int,
    bits: tuple[int, int],
    threads: int,
    *,
    page_length: int = PAGE_LENGTH,
    window: int = 0,
) -> Callable[[], Tensor]:
    """The op on pages that lie in random order; the function returns the output [B, S, H*D].

    Args:
        problem: what is to be computed; its caches are copied, in the storage of ``bits``.
        kept: KV heads in the K cache.
        bits: of keys and of values: 0 (the dtype of the problem), 16, 8 or 4.
        threads: of ONNX Runtime's pool.
        page_length: positions of a page.
        window: positions that a token sees, 0 for all; of a decode step, the pages before it are none.
    """
    library = find_library(ONNXRUNTIME_LIBRARY)
    assert library is not None, "the native library is not installed"
    case = problem.case
    attributes = Attributes(
        probe_tokens=PAPER_PROBE_TOKENS,
        key_bits=bits[0],
        value_bits=bits[1],
        group=case.group,
        window=window,
    )
    entries = -(-case.length // page_length)
    gone = max(0, case.length - window) // page_length if window else 0
    table = np.full((case.batch, entries), -1, np.int32)
    held = table[:, gone:]
    held[:] = np.random.default_rng(1).permutation(held.size).reshape(held.shape)
    feeds = {**problem.op_inputs(kept), "page_table": table}
    for name, cache, stored in (
        ("key", problem.compact_keys(kept), bits[0]),
        ("value", problem.value_cache, bits[1]),
    ):
        feeds |= _pool(name, cache, Storage(stored, case.head_dim, case.group), table, page_length)
    bound = OpSession(attributes, case.dtype, library, threads=threads).bind(feeds, in_place=True)
    return lambda: bound.run()["output"]


def _pool(
    name: str, cache: Tensor, storage: Storage, table: NDArray[np.int32], page_length: int
) -> dict[str, Tensor]:
    """Rows [B, heads, T, D] as the pool of pages that the table names, some rows of one head at a time."""
    batch, heads, length, _ = cache.shape
    shape = (int(table.max()) + 1, heads, page_length)
    pool = {f"{name}_cache": np.zeros((*shape, storage.columns), storage.dtype(cache.dtype))}
    if storage.quantised:
        pool[f"{name}_scales"] = np.zeros((*shape, storage.scale_columns), np.float16)
    step = max(_STEP // page_length, 1) * page_length
    for row, head, first in np.ndindex(batch, heads, -(-length // step)):
        rows = cache[row, head, first * step : (first + 1) * step]
        whole = np.zeros((-(-len(rows) // page_length) * page_length, cache.shape[3]), cache.dtype)
        whole[: len(rows)] = rows
        begin = first * step // page_length
        pages = table[row, begin : begin + len(whole) // page_length]
        stored, scales = storage.store(whole)
        held = pages >= 0
        pool[f"{name}_cache"][pages[held], head] = stored.reshape(len(pages), page_length, -1)[held]
        if scales is not None:
            pool[f"{name}_scales"][pages[held], head] = scales.reshape(len(pages), page_length, -1)[held]
    return pool
