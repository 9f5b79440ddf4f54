"""The tensors of a TensorRT call that are not caches: its inputs in one buffer, which one copy fills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from chai_export.runtime.tensorrt_device import CudaDevice

_ALIGNMENT = 256
"""Bytes: what TensorRT asks of addresses."""

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class PackedTensors:
    """Tensors of fixed shapes that lie in one buffer on the device, and again in one on the host.

    Args:
        device: where they live.
        shapes: shape and type by name.
    """

    def __init__(self, device: CudaDevice, shapes: Shapes) -> None:
        places, size = {}, 0
        for name, (shape, dtype) in shapes.items():
            length = int(torch.Size(shape).numel()) * dtype.itemsize
            places[name] = (size, length)
            size += -(-length // _ALIGNMENT) * _ALIGNMENT
        self._buffer = device.empty((size,), torch.uint8)
        self._staged = device.pinned(size)
        self.on_device, self._on_host = (
            {
                name: buffer[start : start + length].view(shapes[name][1]).view(shapes[name][0])
                for name, (start, length) in places.items()
            }
            for buffer in (self._buffer, self._staged)
        )

    def fill(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Give every tensor its content, in the device's stream: wait for it before the next time."""
        for name, tensor in self._on_host.items():
            tensor.numpy()[...] = arrays[name]
        self._buffer.copy_(self._staged, non_blocking=True)
