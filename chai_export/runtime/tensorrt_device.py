"""What the TensorRT session asks of a CUDA device, through torch: memory, a stream, graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from chai_export.errors import ChaiError


class CudaDevice:
    """The current CUDA device with one stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @property
    def stream_handle(self) -> int:
        """The stream's ``cudaStream_t`` as a number."""
        return int(self._stream.cuda_stream)

    def in_stream(self) -> AbstractContextManager[object]:
        """Torch work inside goes to the stream."""
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        self._stream.synchronize()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory on the device.

        Raises:
            ChaiError: there is not enough.
        """
        try:
            return torch.empty(tuple(shape), dtype=dtype, device="cuda")
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info()
            raise ChaiError(
                f"a tensor of {list(shape)} does not fit in GPU memory ({free / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB are free); lower --max-seq or give shorter or fewer prompts"
            ) from error

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 [size] on the host, which copies to the device read without a detour."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def free_memory(self) -> int:
        """Bytes that can be had on the device."""
        torch.cuda.empty_cache()  # what torch keeps of tensors that are gone
        return int(torch.cuda.mem_get_info()[0])

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work``, which is not run, as a CUDA graph; call the result to run it.

        Other threads of the program may go on allocating meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
