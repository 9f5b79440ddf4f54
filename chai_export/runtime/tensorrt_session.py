"""A bundle's TensorRT engine: rows in pages of pools on the GPU, appended to in place, decode in CUDA graphs.

Each pool is one buffer, bound as past and as present. It is allocated when a batch begins, for all that its
rows may need: TensorRT has no tensor that grows. Layers with a window hold all pages of a row too. Head maps
are kept here by row and travel with each call.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.bundle.engine_record import require_engine
from chai_export.bundle.graph_io import (
    HEAD_MAP,
    INPUT_IDS,
    LENGTHS,
    LOGITS,
    OUTPUT_POSITIONS,
    PAGE_LENGTH,
    PAST_LENGTHS,
    PRESENT_HEAD_MAP,
    kept_sizes,
    page_table,
    pool_sizes,
)
from chai_export.bundle.manifest import Manifest
from chai_export.bundle.op_nodes import check_op_nodes
from chai_export.errors import ChaiError
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.runtime.cache import Budget, memory_error
from chai_export.runtime.likeliest import Likeliest
from chai_export.runtime.pages import PagePool
from chai_export.runtime.row_pages import RowPages, Stack
from chai_export.runtime.tensorrt_device import CudaDevice
from chai_export.runtime.tensorrt_environment import (
    HELD_AS,
    PLUGIN_VERSION,
    import_tensorrt,
    require_gpu,
    require_plugin,
)
from chai_export.runtime.tensorrt_tensors import PackedTensors

PREFILL, DECODE = 0, 1
"""Indices of an engine's profiles: any S and N, and S = N = 1."""
MOST_GRAPHS = 16
"""Shapes of decode steps that have a graph at one time; each has a context of TensorRT of its own."""
_ELEMENT_TYPES = {element.tensorrt: name for name, element in ELEMENT_TYPES.items()}
_LARGEST = 2
"""Of the three shapes that a profile has for each input."""


class TensorRtSession:
    """The :class:`~chai_export.runtime.session.Session` of TensorRT.

    Args:
        manifest: of the bundle that the engine was built from.
        heads: "chai", or "all" for K caches with every KV head, which makes the same engine plain attention.
        engine: an ``ICudaEngine`` with profiles for prefill and decode.
        tensorrt: its module.
        cache_memory: bytes that the pools may take; None for what is free.
        device: where the tensors live; the current CUDA device if not given.

    Attributes:
        page_length: positions of a page, which the engine was built for.

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
        cache_memory: int | None = None,
        device: CudaDevice | None = None,
    ) -> None:
        self._manifest = manifest
        self._heads = heads
        self._cache_memory = cache_memory
        self._device = device or CudaDevice()
        self._engine = engine
        self._strategy = tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        _check_engine(engine, manifest)
        self._io = manifest.io
        self._tables = [page_table(window) for window in manifest.cache_windows]
        self._logits_type = getattr(torch, _ELEMENT_TYPES[engine.get_tensor_dtype(LOGITS).name])
        largest = engine.get_tensor_profile_shape(self._io.caches[0].past.name, PREFILL)[_LARGEST]
        self.page_length = int(largest[2])
        self._most_row_pages = int(engine.get_tensor_profile_shape(self._tables[0], PREFILL)[_LARGEST][1])
        size = max(engine.get_device_memory_size_for_profile_v2(profile) for profile in (PREFILL, DECODE))
        with self._device.in_stream():
            self._scratch = self._device.empty((size,), torch.int8)
        self._prefill = self._make_context(PREFILL)
        self._spare = [self._make_context(DECODE)]
        self._caches: dict[str, torch.Tensor] = {}
        self._decodes: OrderedDict[tuple[int, ...], _Decode] = OrderedDict()
        self._longest = 0
        self._set_rows(0, 0)

    def _make_context(self, profile: int) -> Any:
        """Of a profile; scratch memory is in common, since contexts never run at one time."""
        context = self._engine.create_execution_context(self._strategy)
        if context is None:
            raise ChaiError("TensorRT could not make an execution context; see its message above")
        if not context.set_optimization_profile_async(profile, self._device.stream_handle):
            raise ChaiError(f"the engine has no profile {profile}; build it with `chai-export build`")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        return context

    @property
    def in_place(self) -> bool:
        """The plugin appends to the caches it is given."""
        return True

    @property
    def bounded_scratch(self) -> bool:
        """The plugin works in blocks, and an engine's memory is set aside for its longest chunk anyway."""
        return True

    @property
    def capacity(self) -> int:
        """Tokens that the row with the largest promise may have."""
        return self._longest

    @property
    def pool(self) -> PagePool:
        """The pages of the rows since :meth:`start`."""
        return self._pages.whole

    @property
    def pages(self) -> RowPages:
        """The same, since layers with a window hold all tokens too."""
        return self._pages

    @property
    def held_tokens(self) -> dict[int, int]:
        """Positions of the pages that rows held, by window; see :class:`.session.Session`."""
        return dict.fromkeys((0, *self._manifest.cache_windows), self.pool.peak * self.page_length)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers: codes and scales of keys and values."""
        return self._manifest.kv_bytes_per_token(self._heads) * self.page_length

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools since :meth:`start`."""
        return self.pool.pages * self.page_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that are not free now."""
        return self.pool.held * self.page_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(int(pool.nbytes) for pool in self._caches.values())

    @property
    def head_map(self) -> NDArray[np.int32]:
        """int32 [L,B,H] by row (a copy)."""
        return self._head_map.copy()

    def budget(self, rows: int = 1, chunk: int = 0) -> tuple[int, Budget]:
        """Tokens that fit in a pool now, and what bounds them; see :class:`.session.Session`."""
        budget = Budget.now(self._cache_memory, self._device.free_memory(), "GPU memory")
        return budget.size // self.page_bytes * self.page_length, budget

    def start(self, rows: int, pages: int, chunk: int = 0, windows: int | None = None) -> None:
        """Begin anew with ``rows`` empty rows, and allocate pools of so many pages.

        Raises:
            ChaiError: there is not enough GPU memory.
        """
        self.drop()
        self._set_rows(rows, pages)
        kept = kept_sizes(self._manifest.heads(self._heads))
        sizes = {PAGE_LENGTH: self.page_length, **pool_sizes(self._io, pages), **kept}
        with self._device.in_stream():
            for cache in self._io.caches:
                shape, dtype = cache.past.shape(sizes), getattr(torch, cache.past.dtype)
                self._caches[cache.past.name] = self._device.empty(shape, dtype)

    def begin(self, batch: int, capacity: int) -> None:
        """Begin anew with ``batch`` rows, each with a promise of ``capacity`` tokens.

        Raises:
            ChaiError: there is not enough GPU memory.
        """
        self.drop()
        tokens, budget = self.budget()
        pages = batch * self.pool.count(capacity)
        if pages * self.page_length > tokens:
            raise memory_error(batch, capacity, pages * self.page_bytes, budget)
        self.start(batch, pages)
        for row in range(batch):
            promised = self.promise(row, capacity)
            assert promised

    def drop(self) -> None:
        """Give the memory of the caches back."""
        self._spare += [decode.context for decode in self._decodes.values()]
        self._decodes.clear()
        self._caches.clear()
        self._set_rows(0, 0)

    def promise(self, row: int, tokens: int) -> bool:
        """Promise a row room for ``tokens`` in all, if pages for them are there."""
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
        self.pool.extend(row, tokens)
        (page,), used = stack, (tokens - 1) % self.page_length + 1
        target = self.pool.pages_of(row)[-1]
        with self._device.in_stream():
            for pool in self._caches.values():
                pool[target, :, :used] = pool[page, :, :used]

    def step(
        self,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        output_positions: NDArray[np.int64],
        rope_lengths: NDArray[np.int32] | None = None,
        rows: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Feed new tokens; see :meth:`chai_export.runtime.session.Session.step`.

        Raises:
            ChaiError: TensorRT refuses the shapes or the step.
        """
        of = np.arange(len(lengths)) if rows is None else np.asarray(rows, np.int64)
        fed: dict[str, NDArray[Any]] = {
            INPUT_IDS: input_ids,
            LENGTHS: lengths,
            PAST_LENGTHS: past_lengths,
            OUTPUT_POSITIONS: output_positions,
        }
        active = np.flatnonzero(lengths > 0)
        if len(active) == len(lengths):
            return self._call(fed, of)
        logits = np.zeros((*output_positions.shape, self._manifest.vocab_size), np.float32)
        if len(active):
            logits[active] = self._call({name: array[active] for name, array in fed.items()}, of[active])
        return logits

    def step_top(
        self,
        count: int,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int32],
        past_lengths: NDArray[np.int32],
        output_positions: NDArray[np.int64],
        rope_lengths: NDArray[np.int32] | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Likeliest]:
        """A step of rows that all have work, of whose logits at one position the likeliest come to the host.

        Args:
            count: so many of them, or all that there are.
            input_ids: as the others those of :meth:`step`, ``output_positions`` int64 [B,1].
        """
        of = np.arange(len(lengths)) if rows is None else np.asarray(rows, np.int64)
        fed: dict[str, NDArray[Any]] = {
            INPUT_IDS: input_ids,
            LENGTHS: lengths,
            PAST_LENGTHS: past_lengths,
            OUTPUT_POSITIONS: output_positions,
        }
        chosen: list[NDArray[Any]] = []

        def read(logits: torch.Tensor) -> NDArray[np.float32]:
            best, tokens = logits[:, 0].float().topk(min(count, logits.shape[-1]))
            both = torch.cat([best.view(torch.int32), tokens.int()], dim=1).cpu().numpy()  # one wait
            chosen.append(both[:, best.shape[1] :].astype(np.int64))
            values: NDArray[np.float32] = np.ascontiguousarray(both[:, : best.shape[1]]).view(np.float32)
            self._logits = logits
            return values

        values = self._call(fed, of, read)
        return [
            Likeliest(tokens, logits, partial(self._whole_row, line))
            for line, (tokens, logits) in enumerate(zip(chosen[0], values, strict=True))
        ]

    def _whole_row(self, line: int) -> NDArray[np.float32]:
        """Logits [V] of the last step."""
        with self._device.in_stream():
            whole: NDArray[np.float32] = self._logits[line, 0].float().cpu().numpy()
        return whole

    def _call(
        self,
        fed: dict[str, NDArray[Any]],
        rows: NDArray[np.int64],
        read: Callable[[torch.Tensor], NDArray[np.float32]] = lambda logits: logits.float().cpu().numpy(),
    ) -> NDArray[np.float32]:
        """Run the engine on active rows; ``read`` takes what is wanted of the logits [B,N,V] to the host."""
        totals = fed[PAST_LENGTHS] + fed[LENGTHS]
        for row, tokens in zip(rows.tolist(), totals.tolist(), strict=True):
            self.pool.extend(row, tokens)
        tables = dict.fromkeys(self._tables, self._page_table(rows))
        arrays = {**fed, **tables, HEAD_MAP: self._head_map[:, rows]}
        with self._device.in_stream():
            if fed[INPUT_IDS].shape[1] == 1 and fed[OUTPUT_POSITIONS].shape[1] == 1:
                outputs = self._decode_step(arrays)
            else:
                outputs = self._prefill_step(arrays)
            result = read(outputs[LOGITS])
            if (fed[PAST_LENGTHS] == 0).any():  # maps of other rows stay what they were
                self._head_map[:, rows] = outputs[PRESENT_HEAD_MAP].cpu().numpy()
        self._device.synchronize()
        return result

    def _page_table(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """As wide as a power of two: decode steps change shape when a row doubles, not with each page."""
        table = self.pool.table(rows.tolist())
        width = min(1 << (table.shape[1] - 1).bit_length(), self._most_row_pages)
        return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-1)

    def _prefill_step(self, arrays: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        feeds = self._feeds(arrays)
        outputs = self._bind(self._prefill, feeds)
        self._execute(self._prefill)
        return outputs

    def _decode_step(self, arrays: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        shape = arrays[self._tables[0]].shape
        decode = self._decodes.get(shape)
        if decode is None:
            context = self._decode_context()
            feeds = self._feeds(arrays)
            decode = self._decodes[shape] = _Decode(context, feeds, self._bind(context, feeds))
            # The first run is outside the graph: TensorRT prepares for the new shapes in it.
            self._execute(context)
            return decode.outputs
        self._decodes.move_to_end(shape)
        decode.feeds.fill(arrays)
        if decode.replay is None:
            context = decode.context
            decode.replay = self._device.capture(lambda: self._execute(context))
        decode.replay()
        return decode.outputs

    def _decode_context(self) -> Any:
        """One that no graph uses: a graph is good as long as its context stays as it was."""
        if len(self._decodes) == MOST_GRAPHS:
            _, oldest = self._decodes.popitem(last=False)
            self._spare.append(oldest.context)
        return self._spare.pop() if self._spare else self._make_context(DECODE)

    def _feeds(self, arrays: dict[str, NDArray[Any]]) -> PackedTensors:
        values = (*self._io.step, self._io.head_map)
        shapes = {value.name: (arrays[value.name].shape, getattr(torch, value.dtype)) for value in values}
        feeds = PackedTensors(self._device, shapes)
        feeds.fill(arrays)
        return feeds

    def _bind(self, context: Any, feeds: PackedTensors) -> dict[str, torch.Tensor]:
        """Set every shape and address of a context; returns the tensors that receive logits and maps."""
        fed = feeds.on_device
        sizes = (*fed[OUTPUT_POSITIONS].shape, self._manifest.vocab_size)
        made = {
            LOGITS: self._device.empty(sizes, self._logits_type),
            PRESENT_HEAD_MAP: self._device.empty(fed[HEAD_MAP].shape, torch.int32),
        }
        caches = self._io.caches
        inputs = {**fed, **self._caches}
        outputs = {**made, **{c.present.name: self._caches[c.past.name] for c in caches}}
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ChaiError(
                    f"the engine does not take {name} of shape {list(tensor.shape)}; build it with a higher "
                    "--max-batch or --max-seq"
                )
        for name, tensor in chain(inputs.items(), outputs.items()):
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise ChaiError(f"TensorRT refuses the address of {name}; build the engine again")
        return made

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream_handle):
            raise ChaiError("TensorRT could not run the step; see its message above")

    def _set_rows(self, rows: int, pages: int) -> None:
        manifest = self._manifest
        self._pages = RowPages({0: pages}, self.page_length)
        self._longest = 0
        self._head_map = np.zeros((manifest.num_layers, rows, manifest.num_query_heads), np.int32)


class _Decode:
    """Fixed tensors of decode steps of one shape, their context, and their graph once there is one."""

    def __init__(self, context: Any, feeds: PackedTensors, outputs: dict[str, torch.Tensor]) -> None:
        self.context = context
        self.feeds = feeds
        self.outputs = outputs
        self.replay: Callable[[], None] | None = None


def open_tensorrt_session(
    bundle: Bundle, heads: Heads, *, cache_memory: int | None = None
) -> TensorRtSession:
    """The session of a bundle's TensorRT engine; ``cache_memory`` as :class:`TensorRtSession`.

    Raises:
        ChaiError: there is no engine, it does not fit this machine, or something it needs is missing.
    """
    tensorrt = import_tensorrt()
    gpu = require_gpu()
    require_plugin(tensorrt)
    record = require_engine(
        bundle,
        Backend.TENSORRT,
        runtime="TensorRT",
        runtime_version=tensorrt.__version__,
        gpu_architecture=gpu.target,
        plugin_version=PLUGIN_VERSION,
    )
    check_op_nodes(bundle)
    plan = next((name for name in record.files if name.endswith(".plan")), None)
    if plan is None:
        raise ChaiError(
            f"the {Backend.TENSORRT} engine of {bundle.path} has no .plan file; run `chai-export build "
            f"{bundle.path} --backend {Backend.TENSORRT}` again"
        )
    engine = load_engine(tensorrt, (bundle.path / plan).read_bytes())
    return TensorRtSession(bundle.manifest, heads, engine, tensorrt=tensorrt, cache_memory=cache_memory)


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
    io = manifest.io
    wanted = {value.name: {HELD_AS.get(d, d): d for d in value.dtypes} for value in (*io.inputs, *io.outputs)}
    found = {name: _ELEMENT_TYPES.get(types[name], types[name]) for name in names}
    difference = io.difference(
        {name: (wanted.get(name, {}).get(found[name], found[name]), dims[name]) for name in names}
    )
    if difference is not None:
        raise ChaiError(f"the engine is of another model: {difference}; build it again")
