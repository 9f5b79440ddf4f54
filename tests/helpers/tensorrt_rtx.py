"""TensorRT-RTX's own ONNX parser and builder, which need no GPU, on a bundle's graph without its attentions.

It has no plugins, so the network is cut: what attention takes becomes outputs, what it gives inputs. Parsing
and building happen in a process of their own, which a graph may end.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.graph_io import INPUT_IDS
from chai_export.engines.tensorrt import (
    DIRECTORY,
    INTEGER_WEIGHTS,
    build_plan,
    network_for_parser,
    require_supported,
    save,
)
from chai_export.engines.tensorrt_parser import require_parsed
from chai_export.engines.tensorrt_profiles import Range, profiles
from chai_export.errors import ChaiError
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.schema import DOMAIN

MODULE = "tensorrt_rtx_bindings"
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
LIKE_TENSORRT = (11, 4)
"""The version of TensorRT whose operators this one's parser takes."""
Shapes = tuple[dict[str, Range], ...]


@dataclass(frozen=True)
class Built:
    """An engine of TensorRT-RTX, or why there is none.

    ``layers`` are the network's, ``seconds`` those of processors, which other programs do not lengthen, and
    ``size`` is in bytes.
    """

    layers: int = 0
    seconds: float = 0.0
    size: int = 0
    refused: str = ""


def build_cut(bundle: Bundle, max_batch: int = 4, max_seq: int = 64) -> Built:
    """Build what ``build --backend tensorrt`` would, but for the attentions, with its own code."""
    try:
        require_supported(bundle)
        path, shapes = write_cut(bundle, max_batch, max_seq)
    except ChaiError as error:
        return Built(refused=str(error))
    return in_worker(path, shapes)


def write_cut(bundle: Bundle, max_batch: int, max_seq: int) -> tuple[Path, Shapes]:
    """The network beside the bundle's weights, cut at its attentions, and its profiles."""
    weights = bundle.path / DIRECTORY / INTEGER_WEIGHTS
    weights.parent.mkdir(parents=True, exist_ok=True)
    model = network_for_parser(bundle, weights)
    fed = cut_at_attention(model, bundle)
    path = bundle.path / "cut.onnx"
    save(model, path)
    shapes = []
    for profile in profiles(bundle.manifest, max_batch, max_seq):
        ids = profile[INPUT_IDS]
        cut = dict(profile)
        for name, (leading, rest) in fed.items():
            cut[name] = Range(*((*shape[:leading], rest) for shape in (ids.least, ids.likely, ids.most)))
        shapes.append(cut)
    return path, tuple(shapes)


def cut_at_attention(model: onnx.ModelProto, bundle: Bundle) -> dict[str, tuple[int, int]]:
    """Take the op nodes out of a graph.

    Returns:
        For each new input how many of the axes [B, S] it has, and the size of the one after those.
    """
    manifest, graph = bundle.manifest, model.graph
    float_type = ELEMENT_TYPES[manifest.dtype].onnx
    attentions = [node for node in graph.node if node.domain == DOMAIN]
    rest = [node for node in graph.node if node.domain != DOMAIN]
    read = {name for node in rest for name in node.input}
    made = {name for node in rest for name in node.output}
    fed: dict[str, tuple[int, int]] = {}
    for node in attentions:
        kinds = {node.output[0]: (2, manifest.num_query_heads * manifest.value_head_dim, float_type)}
        kinds[node.output[-1]] = (1, manifest.num_query_heads, onnx.TensorProto.INT32)
        for name, (leading, size, element) in kinds.items():
            if name in read:
                fed[name] = (leading, size)
                axes = ["batch", "tokens"][:leading]
                graph.input.append(onnx.helper.make_tensor_value_info(name, element, [*axes, size]))
        for index, name in enumerate(node.input):
            if name in made and name not in {output.name for output in graph.output}:
                element = float_type if index < 3 else onnx.TensorProto.INT32
                graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    outputs = [output for output in graph.output if output.name in made]
    del graph.output[:], graph.node[:]
    graph.output.extend(outputs)
    graph.node.extend(rest)
    return fed


def in_worker(path: Path, shapes: Shapes) -> Built:
    """Parse and build in a process that lives until a graph ends it."""
    try:
        return _worker().submit(_build, path, shapes).result()
    except BrokenProcessPool as error:
        _worker.cache_clear()
        return Built(refused=f"the process ended ({error})")


@lru_cache
def _worker() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    worker = ProcessPoolExecutor(1, mp_context=context, initializer=_play_tensorrt)
    atexit.register(worker.shutdown)
    return worker


def _play_tensorrt() -> None:
    """polygraphy uses TensorRT-RTX; the bindings' package lies under another name than it looks for."""
    import importlib

    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ[SWITCH] = "1"
    sys.modules["tensorrt_rtx"] = importlib.import_module(MODULE)


def _end_with_parent() -> None:
    """A worker of a pool would wait for work for ever: it has the writing end of its own queue."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Watched:
    """polygraphy, with a look at the network."""

    def __init__(self, polygraphy: Any) -> None:
        self._polygraphy = polygraphy
        self.network: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._polygraphy, name)

    def create_network(self, **given: Any) -> Any:
        builder, self.network = self._polygraphy.create_network(**given)
        return builder, self.network


def _build(path: Path, shapes: Shapes) -> Built:
    import polygraphy.backend.trt

    tensorrt = sys.modules["tensorrt_rtx"]
    watched = _Watched(polygraphy.backend.trt)
    start = time.process_time()
    try:
        model = onnx.load(str(path), load_external_data=False)
        require_parsed(tensorrt, watched, model, LIKE_TENSORRT)
        plan = build_plan(
            tensorrt,
            watched,
            path,
            shapes,
            plugin_layers=0,
            builder_memory=None,
            alias_caches=False,
            timing_cache=None,  # with one this builder asks for a GPU
        )
    except ChaiError as error:
        return Built(refused=str(error))
    return Built(watched.network.num_layers, time.process_time() - start, plan.nbytes)
