"""An engine for tests of the TensorRT session without a GPU: ONNX Runtime behind TensorRT's calls.

It holds the session to what TensorRT would: every shape within the profile, every address set before a step,
nothing allocated or bound anew between the capture of a graph and its replays.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from chai_export.bundle.bundle import Bundle
from chai_export.engines.tensorrt_profiles import Range, profiles
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.runtime.pages import PAGE_LENGTH

ENGINE_TYPES = {element.onnxruntime: element.tensorrt for element in ELEMENT_TYPES.values()}
ENGINE_TYPES["tensor(uint8)"] = "INT8"
USER_MANAGED = "user managed"
TENSORRT = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=USER_MANAGED))
"""The part of the module that the session uses."""
_recorded: list[list[Callable[[], None]]] = []
"""Steps that a capture goes on to record; empty while steps run."""
NUMPY_TYPES = {element.onnxruntime: element.numpy for element in ELEMENT_TYPES.values()}


class FakeEngine:
    """The part of ``ICudaEngine`` that the session uses, over a bundle's function body.

    ``calls`` are rows and tokens of every step.
    """

    def __init__(self, bundle: Bundle, max_batch: int, max_seq: int, page_length: int = PAGE_LENGTH) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            str(bundle.model_path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {node.name: node.type for node in self.session.get_inputs()}
        self.outputs = {node.name: node.type for node in self.session.get_outputs()}
        self.profiles = profiles(bundle.manifest, max_batch, max_seq, page_length)
        self.contexts: list[FakeContext] = []
        self.calls: list[tuple[int, ...]] = []
        self._names = [*self.inputs, *self.outputs]

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=ENGINE_TYPES[{**self.inputs, **self.outputs}[name]])

    def get_tensor_shape(self, name: str) -> list[int]:
        nodes = (*self.session.get_inputs(), *self.session.get_outputs())
        shape = next(node.shape for node in nodes if node.name == name)
        return [size if isinstance(size, int) else -1 for size in shape]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        shapes = self.profiles[profile][name]
        return [shapes.least, shapes.likely, shapes.most]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return (3000, 500)[profile]

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == USER_MANAGED
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """The part of ``IExecutionContext`` that the session uses. ``executed`` counts steps."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._profile: Mapping[str, Range] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.executed = 0
        self.bound = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self._profile, "the profile decides the size"
        self.memory = (memory, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = self._engine.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        allowed = self._profile[name]
        within = zip(allowed.least, shape, allowed.most, strict=True)
        if not all(least <= size <= most for least, size, most in within):
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._engine.inputs or name in self._engine.outputs
        self._addresses[name] = address
        self.bound += 1
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory[1] == 3000
        assert self._addresses["head_map"] != self._addresses["present_head_map"]
        if not _recorded:
            self._step()
            return True
        bound = self.bound

        def step() -> None:
            assert self.bound == bound, "the context of a graph was changed"
            self._step()

        _recorded[-1].append(step)
        return True

    def _step(self) -> None:
        feeds = {n: self._view(n, kind, self.shapes[n]).copy() for n, kind in self._engine.inputs.items()}
        names = list(self._engine.outputs)
        for name, result in zip(names, self._engine.session.run(names, feeds), strict=True):
            self._view(name, self._engine.outputs[name], result.shape)[...] = result
        self.executed += 1
        self._engine.calls.append(self.shapes["input_ids"])

    def _view(self, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = NUMPY_TYPES[kind]
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_byte * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class HostDevice:
    """The session's device on host memory. A graph runs the steps that its capture recorded, and counts them.

    Memory is asked for inside the stream only: work on another stream would not wait for this one.
    """

    stream_handle = 1

    def __init__(self, memory: int = 1 << 30) -> None:
        self.captured = 0
        self.replayed = 0
        self.memory = memory
        self._inside = False

    @contextlib.contextmanager
    def in_stream(self) -> Iterator[None]:
        assert not self._inside
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def synchronize(self) -> None:
        """Host work is done at once."""

    def empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        assert self._inside
        tensor = torch.empty(tuple(shape), dtype=dtype)
        return tensor.fill_(float("nan")) if dtype.is_floating_point else tensor.fill_(77)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0x55, dtype=torch.uint8)

    def free_memory(self) -> int:
        return self.memory

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        _recorded.append([])
        work()
        steps = _recorded.pop()

        def replay() -> None:
            self.replayed += 1
            for step in steps:
                step()

        return replay
