"""A bundle's TensorRT engine: two profiles, caches bound once and appended in place, decode in a CUDA graph.

With the plugin each cache is one buffer, bound as past and as present. An engine of the function body reads
the whole past while it writes the whole present, so its caches are two sets of buffers that swap roles. The
head map always has two, and the new one is copied over the old one after the step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.bundle.engine_record import require_engine
from chai_export.bundle.graph_io import (
    BATCH,
    CAPACITY,
    HEAD_MAP,
    LOGITS,
    OUTPUT_POSITIONS,
    PRESENT_HEAD_MAP,
    kept_sizes,
)
from chai_export.bundle.manifest import Manifest
from chai_export.bundle.op_nodes import check_op_nodes
from chai_export.errors import ChaiError
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.runtime.native import SWITCH
from chai_export.runtime.tensorrt_device import CudaDevice
from chai_export.runtime.tensorrt_environment import (
    PLUGIN_VERSION,
    import_tensorrt,
    require_gpu,
    require_plugin,
)

PREFILL, DECODE = 0, 1
"""Indices of an engine's profiles: any S and N, and S = N = 1."""
_ELEMENT_TYPES = {element.tensorrt: name for name, element in ELEMENT_TYPES.items()}


class TensorRtSession:
    """The :class:`~chai_export.runtime.session.Session` of TensorRT.

    Args:
        manifest: of the bundle that the engine was built from.
        heads: "chai", or "all" for K caches with every KV head, which makes the same engine plain attention.
        engine: an ``ICudaEngine`` with profiles for prefill and decode.
        tensorrt: its module.
        in_place: the engine has the plugin, which appends to the caches it is given.
        device: where the tensors live; the current CUDA device if not given.

    Raises:
        ChaiError: the engine's inputs and outputs are not the manifest's, or its memory cannot be had.
    """

    def __init__(
        self,
        manifest: Manifest,
        heads: Heads | str,
        engine: Any,
        *,
        tensorrt: Any,
        in_place: bool,
        device: CudaDevice | None = None,
    ) -> None:
        self._manifest = manifest
        self._heads = heads
        self.in_place = in_place
        self._device = device or CudaDevice()
        self._engine = engine
        _check_engine(engine, manifest)
        self._io = manifest.io
        self._logits_type = getattr(torch, _ELEMENT_TYPES[engine.get_tensor_dtype(LOGITS).name])
        self._contexts = self._make_contexts(tensorrt)
        self._batch = 0
        self._capacity = 0
        self._caches: list[dict[str, torch.Tensor]] = []
        self._decode: _Decode | None = None
        self._bound: tuple[dict[str, torch.Tensor], ...] = ()

    def _make_contexts(self, tensorrt: Any) -> list[Any]:
        """One per profile, with scratch memory in common: they never run at one time."""
        engine, profiles = self._engine, (PREFILL, DECODE)
        size = max(engine.get_device_memory_size_for_profile_v2(profile) for profile in profiles)
        with self._device.in_stream():
            self._scratch = self._device.empty((size,), torch.int8)
        contexts = []
        for profile in profiles:
            context = engine.create_execution_context(
                tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
            if context is None:
                raise ChaiError("TensorRT could not make an execution context; see its message above")
            if not context.set_optimization_profile_async(profile, self._device.stream_handle):
                raise ChaiError(f"the engine has no profile {profile}; build it with `chai-export build`")
            context.set_device_memory(self._scratch.data_ptr(), size)
            contexts.append(context)
        return contexts

    @property
    def bounded_scratch(self) -> bool:
        """The plugin works in blocks, and an engine's memory is set aside for its longest chunk anyway."""
        return True

    @property
    def capacity(self) -> int:
        """Tokens that fit in each row of the caches; 0 before :meth:`begin`."""
        return self._capacity

    @property
    def cache_bytes(self) -> int:
        """Bytes of all cache buffers."""
        per_token = self._manifest.kv_bytes_per_token(self._heads)
        return len(self._caches) * self._batch * self._capacity * per_token

    @property
    def head_map(self) -> NDArray[np.int32]:
        """int32 [L,B,H] after the last step (a copy)."""
        result: NDArray[np.int32] = self._head_map.cpu().numpy().copy()
        return result

    def begin(self, batch: int, capacity: int) -> None:
        """Allocate for ``batch`` empty rows of ``capacity`` tokens.

        Raises:
            ChaiError: there is not enough GPU memory.
        """
        self._drop()
        self._batch, self._capacity = batch, capacity
        shape = (self._manifest.num_layers, batch, self._manifest.num_query_heads)
        with self._device.in_stream():
            self._caches = [self._new_cache() for _ in range(1 if self.in_place else 2)]
            self._head_map = self._device.empty(shape, torch.int32).zero_()
            self._present_head_map = self._device.empty(shape, torch.int32)

    def grow(self, capacity: int) -> None:
        """Enlarge the caches to ``capacity`` tokens, keeping their content.

        Raises:
            ChaiError: there is not enough GPU memory.
        """
        old = self._caches[0]
        self._drop()
        used, self._capacity = self._capacity, capacity
        with self._device.in_stream():
            larger = self._new_cache()
            for name in list(old):
                larger[name][:, :, :used].copy_(old.pop(name))
            self._caches = [larger]
            if not self.in_place:
                self._caches.append(self._new_cache())

    def step(
        self,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        output_positions: NDArray[np.int64],
        rope_lengths: NDArray[np.int32] | None = None,
    ) -> NDArray[np.float32]:
        """Feed new tokens; see :meth:`chai_export.runtime.session.Session.step`.

        Raises:
            ChaiError: TensorRT refuses the shapes or the step.
        """
        assert np.all((lengths == 0) | (past_lengths + lengths <= self.capacity))
        given: tuple[NDArray[Any], ...] = (input_ids, lengths, past_lengths, output_positions)
        arrays = {value.name: array for value, array in zip(self._io.step, given, strict=True)}
        with self._device.in_stream():
            if input_ids.shape[1] == 1 and output_positions.shape[1] == 1:
                logits = self._decode_step(arrays)
            else:
                logits = self._prefill_step(arrays)
            result: NDArray[np.float32] = logits.float().cpu().numpy()
        self._device.synchronize()
        return result

    def _prefill_step(self, arrays: dict[str, NDArray[Any]]) -> torch.Tensor:
        feeds = self._feeds(arrays)
        logits = self._bind(PREFILL, feeds)
        self._execute(PREFILL)
        return logits

    def _decode_step(self, arrays: dict[str, NDArray[Any]]) -> torch.Tensor:
        if self._decode is None:
            feeds = self._feeds(arrays)
            self._decode = _Decode(feeds, self._bind(DECODE, feeds))
            # The first run is outside the graph: TensorRT prepares for the new shapes in it.
            self._execute(DECODE)
            return self._decode.logits
        decode = self._decode
        _fill(decode.feeds, arrays)
        if not self.in_place:
            decode.logits = self._bind(DECODE, decode.feeds)  # the caches have swapped roles
            self._execute(DECODE)
            return decode.logits
        if decode.replay is None:
            decode.replay = self._device.capture(lambda: self._execute(DECODE))
        decode.replay()
        return decode.logits

    def _feeds(self, arrays: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        feeds = {
            value.name: self._device.empty(arrays[value.name].shape, getattr(torch, value.dtype))
            for value in self._io.step
        }
        _fill(feeds, arrays)
        return feeds

    def _bind(self, profile: int, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        """Set every shape and address of a context; returns the tensor that receives the logits."""
        context = self._contexts[profile]
        past, present = self._caches[0], self._caches[-1]
        caches = self._io.caches
        logits = self._device.empty(
            (*feeds[OUTPUT_POSITIONS].shape, self._manifest.vocab_size), self._logits_type
        )
        inputs = {**feeds, HEAD_MAP: self._head_map, **{c.past.name: past[c.past.name] for c in caches}}
        outputs = {
            LOGITS: logits,
            PRESENT_HEAD_MAP: self._present_head_map,
            **{c.present.name: present[c.past.name] for c in caches},
        }
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ChaiError(
                    f"the engine does not take {name} of shape {list(tensor.shape)}; build it with a higher "
                    "--max-batch or --max-seq"
                )
        for name, tensor in chain(inputs.items(), outputs.items()):
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise ChaiError(f"TensorRT refuses the address of {name}; build the engine again")
        self._bound = (inputs, outputs)  # keeps the tensors alive
        return logits

    def _execute(self, profile: int) -> None:
        if not self._contexts[profile].execute_async_v3(self._device.stream_handle):
            raise ChaiError("TensorRT could not run the step; see its message above")
        self._head_map.copy_(self._present_head_map)
        if not self.in_place:
            self._caches.reverse()

    def _new_cache(self) -> dict[str, torch.Tensor]:
        """K and V caches by the name of their input."""
        kept = kept_sizes(self._manifest.heads(self._heads))
        sizes = {BATCH: self._batch, CAPACITY: self._capacity, **kept}
        pasts = [cache.past for cache in self._io.caches]
        return {p.name: self._device.empty(p.shape(sizes), getattr(torch, p.dtype)) for p in pasts}

    def _drop(self) -> None:
        self._decode, self._bound, self._caches = None, (), []


class _Decode:
    """Fixed tensors of decode steps, and their graph once there is one."""

    def __init__(self, feeds: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        self.feeds = feeds
        self.logits = logits
        self.replay: Callable[[], None] | None = None


def _fill(feeds: dict[str, torch.Tensor], arrays: dict[str, NDArray[Any]]) -> None:
    for name, tensor in feeds.items():
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))


def open_tensorrt_session(bundle: Bundle, heads: Heads) -> TensorRtSession:
    """The session of a bundle's TensorRT engine.

    Raises:
        ChaiError: there is no engine, it does not fit this machine, or something it needs is missing.
    """
    tensorrt = import_tensorrt()
    gpu = require_gpu()
    known = bundle.manifest.engines.get(Backend.TENSORRT)
    needs_plugin = known is not None and known.plugin_version is not None
    if needs_plugin and require_plugin(tensorrt) is None:
        raise ChaiError(
            f"the {Backend.TENSORRT} engine of {bundle.path} needs the plugin; leave {SWITCH} unset"
        )
    record = require_engine(
        bundle,
        Backend.TENSORRT,
        runtime="TensorRT",
        runtime_version=tensorrt.__version__,
        gpu_architecture=gpu.target,
        plugin_version=PLUGIN_VERSION if needs_plugin else None,
    )
    check_op_nodes(bundle)
    plan = next((name for name in record.files if name.endswith(".plan")), None)
    if plan is None:
        raise ChaiError(
            f"the {Backend.TENSORRT} engine of {bundle.path} has no .plan file; run `chai-export build "
            f"{bundle.path} --backend {Backend.TENSORRT}` again"
        )
    engine = load_engine(tensorrt, (bundle.path / plan).read_bytes())
    return TensorRtSession(bundle.manifest, heads, engine, tensorrt=tensorrt, in_place=needs_plugin)


def load_engine(tensorrt: Any, plan: bytes) -> Any:
    """Deserialise an engine.

    Raises:
        ChaiError: TensorRT refuses it.
    """
    engine = tensorrt.Runtime(_logger(tensorrt)).deserialize_cuda_engine(plan)
    if engine is None:
        raise ChaiError(
            "TensorRT cannot load the engine (see its message above); "
            "run `chai-export build --backend tensorrt` again"
        )
    return engine


_loggers: list[Any] = []


def _logger(tensorrt: Any) -> Any:
    """Warnings and errors to stderr; one for the process, which TensorRT keeps a pointer to."""
    if not _loggers:

        class Logger(tensorrt.ILogger):  # type: ignore[misc]
            """TensorRT's messages in one line each."""

            def __init__(self) -> None:
                tensorrt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(tensorrt.ILogger.WARNING):
                    print(f"TensorRT: {' '.join(message.split())}", file=sys.stderr)

        _loggers.append(Logger())
    return _loggers[0]


def _check_engine(engine: Any, manifest: Manifest) -> None:
    """Compare an engine's inputs and outputs with the manifest's."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    types = {name: engine.get_tensor_dtype(name).name for name in names}
    # TensorRT has -1 for a size that a call decides.
    dims = {name: [dim if dim >= 0 else None for dim in engine.get_tensor_shape(name)] for name in names}
    difference = manifest.io.difference(
        {name: (_ELEMENT_TYPES.get(types[name], types[name]), dims[name]) for name in names}
    )
    if difference is not None:
        raise ChaiError(f"the engine is of another model: {difference}; build it again")
