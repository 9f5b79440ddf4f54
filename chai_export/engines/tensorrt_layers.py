"""TensorRT against ONNX Runtime, attention by attention: where two backends part when their logits differ."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle, check_files
from chai_export.bundle.choices import Backend
from chai_export.bundle.graph_io import (
    BATCH,
    INPUT_IDS,
    LENGTHS,
    OUTPUT_POSITIONS,
    OUTPUTS,
    PAGE_LENGTH,
    ROW_PAGES,
    TOKENS,
    kept_sizes,
    pool_sizes,
)
from chai_export.engines.tensorrt import (
    DIRECTORY,
    INTEGER_WEIGHTS,
    build_error,
    network_for_parser,
    with_aliases,
)
from chai_export.engines.tensorrt_network import op_nodes, relocated
from chai_export.engines.tensorrt_parser import parse_network
from chai_export.errors import ChaiError
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.runtime.tensorrt_environment import (
    HELD_AS,
    import_polygraphy,
    import_tensorrt,
    require_gpu,
    require_plugin,
)

DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class LayerDifference:
    """The attention output of one layer: largest difference, and largest value of ONNX Runtime's."""

    index: int
    name: str
    max_abs_diff: float
    max_abs: float


def compare_layers(bundle: Bundle, *, tokens: int = DEFAULT_TOKENS, seed: int = 0) -> list[LayerDifference]:
    """Run one prefill of random tokens on both and compare every attention's output.

    TensorRT gets an engine of its own for this, built with polygraphy from the same graph and kernels with
    each attention as an output; ONNX Runtime runs the function body.

    Args:
        bundle: a float32 or float16 bundle with a TensorRT engine.
        tokens: length of the sequence.
        seed: of the tokens.

    Raises:
        ChaiError: as :func:`chai_export.engines.tensorrt.build_tensorrt`; or the bundle has no engine, or is
            bfloat16, which ONNX Runtime does not compute on a CPU.
    """
    build = f"`chai-export build {bundle.path} --backend {Backend.TENSORRT}`"
    record = bundle.manifest.engines.get(Backend.TENSORRT)
    if record is None:
        raise ChaiError(f"{bundle.path} has no {Backend.TENSORRT} engine; run {build} first")
    if bundle.manifest.dtype == Dtype.BFLOAT16:
        raise ChaiError("ONNX Runtime computes no bfloat16 on a CPU; compare a bundle of --dtype float32")
    check_files(bundle.path, record.files, again=f"run {build} again")
    tensorrt, polygraphy = import_tensorrt(), import_polygraphy()
    require_gpu()
    require_plugin(tensorrt)
    feeds = _feeds(bundle, tokens, seed)
    with tempfile.TemporaryDirectory() as scratch:
        # The engine's own integer weights are read; these are the same.
        network = network_for_parser(bundle, Path(scratch, INTEGER_WEIGHTS))
    watched = relocated(network, DIRECTORY, str((bundle.path / DIRECTORY).resolve()), DIRECTORY)
    names = _watch(watched, bundle)
    expected = _run_onnxruntime(bundle, feeds, names)
    alias = bool(record.settings.get("alias_caches", False))
    with _beside_weights(bundle, watched) as path:
        found = _run_tensorrt(tensorrt, polygraphy, path, feeds, bundle.manifest.num_layers, alias)
    return [
        LayerDifference(
            index, name, float(np.abs(found[name] - wanted).max()), float(np.abs(wanted).max(initial=0.0))
        )
        for index, (name, wanted) in enumerate(zip(names, expected, strict=True))
    ]


def _feeds(bundle: Bundle, tokens: int, seed: int) -> dict[str, NDArray[Any]]:
    """One fresh row of random tokens, in one page of that length: page 0."""
    manifest = bundle.manifest
    calls = {BATCH: 1, TOKENS: tokens, OUTPUTS: 1, ROW_PAGES: 1, PAGE_LENGTH: tokens}
    sizes = calls | kept_sizes(manifest.kept_heads) | pool_sizes(manifest.io, 1)
    feeds: dict[str, NDArray[Any]] = {
        value.name: np.zeros(value.shape(sizes), ELEMENT_TYPES[value.dtype].numpy)
        for value in manifest.io.inputs
    }
    feeds[INPUT_IDS] = np.random.default_rng(seed).integers(0, manifest.vocab_size, (1, tokens))
    feeds[LENGTHS][:] = tokens
    feeds[OUTPUT_POSITIONS][:] = tokens - 1
    return feeds


def _watch(model: onnx.ModelProto, bundle: Bundle) -> list[str]:
    """Make every attention's output an output of the graph; their names in the order of the graph."""
    element = ELEMENT_TYPES[bundle.manifest.dtype].onnx
    names = [node.output[0] for node in op_nodes(model, bundle)]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, element, None) for name in names)
    return names


def _run_onnxruntime(
    bundle: Bundle, feeds: dict[str, NDArray[Any]], names: list[str]
) -> list[NDArray[np.float32]]:
    import onnxruntime

    model = onnx.load(str(bundle.model_path), load_external_data=False)
    _watch(model, bundle)
    with _beside_weights(bundle, model) as path:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [result.astype(np.float32) for result in session.run(names, feeds)]


def _run_tensorrt(
    tensorrt: Any, polygraphy: Any, path: Path, feeds: dict[str, NDArray[Any]], layers: int, alias: bool
) -> dict[str, NDArray[np.float32]]:
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    with contextlib.redirect_stdout(sys.stderr), G_LOGGER.verbosity(G_LOGGER.ERROR):
        network = parse_network(tensorrt, polygraphy, path, layers)
        profile = polygraphy.Profile()
        for name, array in feeds.items():
            profile.add(name, array.shape, array.shape, array.shape)
        config = polygraphy.CreateConfig(profiles=[profile])
        if alias:
            config = with_aliases(tensorrt, polygraphy, config)
        try:
            engine = polygraphy.engine_from_network(network, config=config)
            with polygraphy.TrtRunner(engine) as runner:
                results = runner.infer({name: _as_held(array) for name, array in feeds.items()})
        except PolygraphyException as error:
            raise build_error([], str(error)) from error
    return {name: np.array(result, np.float32) for name, result in results.items()}


def _as_held(array: NDArray[Any]) -> NDArray[Any]:
    """The same bytes in the type that TensorRT has for them."""
    return array.view(HELD_AS.get(array.dtype.name, array.dtype.name))


@contextlib.contextmanager
def _beside_weights(bundle: Bundle, model: onnx.ModelProto) -> Iterator[Path]:
    """A graph as a file where the weights it refers to are, for as long as it is read."""
    path = bundle.path / f".layers-{os.getpid()}.onnx"
    try:
        path.write_bytes(model.SerializeToString())
        yield path
    finally:
        path.unlink(missing_ok=True)
