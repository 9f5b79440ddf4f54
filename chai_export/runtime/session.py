"""What the generation loop needs of a backend, and which backends there are."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads


class Session(Protocol):
    """One loaded model with the caches of one batch. Calls are not thread-safe."""

    @property
    def capacity(self) -> int:
        """Tokens that fit in each row of the caches (C)."""
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
    def in_place(self) -> bool:
        """Whether a step appends to the caches where they lie; if not, there are two sets of them."""
        ...

    @property
    def bounded_scratch(self) -> bool:
        """Whether attention needs no memory that grows with new tokens times capacity."""
        ...

    def begin(self, batch: int, capacity: int) -> None:
        """Start a batch of empty rows with room for ``capacity`` tokens each."""
        ...

    def grow(self, capacity: int) -> None:
        """Enlarge the caches, keeping their content."""
        ...

    def step(
        self,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        output_positions: NDArray[np.int64],
        rope_lengths: NDArray[np.int32] | None = None,
    ) -> NDArray[np.float32]:
        """Feed new tokens to every row.

        Args:
            input_ids: int64 [B,S], padded on the right.
            lengths: int32 [B], valid tokens of each row; 0 leaves a row alone.
            past_lengths: int32 [B], tokens already in the cache; 0 starts a row afresh.
            output_positions: int64 [B,N], which of the S tokens want logits.
            rope_lengths: int32 [B], tokens of each row's whole text, those of later steps of the same prefill
                included: they choose the rotary factors of bundles that have several sets, and must be on one
                side of a switch length as long as a cache is kept. Default: the tokens fed so far.

        Returns:
            float32 [B,N,V].
        """
        ...


def open_session(bundle: Bundle, backend: Backend | str, heads: Heads | str, **options: Any) -> Session:
    """Load ``bundle`` with a backend; ``heads`` is "chai" or "all" (same graph, R = G).

    Raises:
        UsageError: the backend or the mode is unknown.
        ChaiError: the backend cannot run this bundle.
    """
    backend, heads = Backend(backend), Heads(heads)
    if backend is Backend.TENSORRT:
        from chai_export.runtime.tensorrt_session import open_tensorrt_session

        return open_tensorrt_session(bundle, heads)
    from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(bundle, heads, **options)
