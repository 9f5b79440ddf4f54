"""TensorRT engines: the bundle's graph with the attention plugin, one profile each for prefill and decode.

What is built lies in ``engines/tensorrt`` of the bundle: ``engine.plan`` and the kernels it carries. Beside
model.onnx lies ``tensorrt.onnx``, the graph as TensorRT's parser reads it, for trtexec.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from chai_export.bundle.atomic import atomic_directory, atomic_file
from chai_export.bundle.bundle import ENGINES_DIRECTORY, MODEL_FILE, Bundle, record_files
from chai_export.bundle.choices import Backend
from chai_export.bundle.hashing import cache_path, sha256_file
from chai_export.bundle.manifest import EngineRecord, FileRecord
from chai_export.bundle.parts import ENGINE
from chai_export.engines.proof import prove_engine
from chai_export.engines.tensorrt_lowering import lower_operators
from chai_export.engines.tensorrt_network import plugin_network, relocated, specs
from chai_export.engines.tensorrt_parser import parse_network, require_known_domains, require_parsed
from chai_export.engines.tensorrt_profiles import Range, profiles, trtexec_shapes
from chai_export.engines.tensorrt_progress import BuildProgress, error_recorder
from chai_export.errors import ChaiError, reason
from chai_export.files import MissingFileError, read_bytes, read_json
from chai_export.kernels.ahead_of_time import INDEX_NAME
from chai_export.kernels.ahead_of_time import compile as compile_kernels
from chai_export.kernels.spec import Spec
from chai_export.op.schema import SHARED_OP_TYPE
from chai_export.runtime.tensorrt_environment import (
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    Gpu,
    import_polygraphy,
    import_tensorrt,
    require_gpu,
    require_plugin,
    version_of,
)
from chai_export.version import CREATED_WITH

DIRECTORY = f"{ENGINES_DIRECTORY}/{Backend.TENSORRT}"
PLAN_FILE = "engine.plan"
NETWORK_FILE = "tensorrt.onnx"
KERNELS = "kernels"
INTEGER_WEIGHTS = "integer_weights.data"
"""Weights in 4 or 8 bits in TensorRT's form, beside the engine."""
_MEBI = 1 << 20
_CAUSES = 2
"""Reports that an error shows: the last one is often the consequence of the one before."""


def build_tensorrt(
    bundle: Bundle,
    max_batch: int,
    max_seq: int,
    *,
    builder_memory: int | None = None,
    kernels: Path | None = None,
    alias_caches: bool = True,
) -> EngineRecord:
    """Build an engine for this machine's GPU inside the bundle and return its record.

    Args:
        bundle: what to build.
        max_batch: most rows of a step.
        max_seq: most tokens of a row.
        builder_memory: bytes of GPU memory that TensorRT may use as workspace. Default: what it likes.
        kernels: directory of kernels that were compiled elsewhere, with one directory for each form of
            storage where there are several; they are compiled here if not given.
        alias_caches: build with the preview feature in which TensorRT knows that the plugin appends to its
            caches in place.

    Raises:
        ChaiError: layers share KV caches, or rotary factors follow the length of a row; TensorRT,
            polygraphy, the plugin library or a GPU is missing or of the wrong version; the kernels are for
            another GPU or model; the parser does not take the graph; memory runs out.
    """
    require_supported(bundle)
    tensorrt = import_tensorrt()
    polygraphy = import_polygraphy()
    gpu = require_gpu()
    plugin = require_plugin(tensorrt)
    shapes = profiles(bundle.manifest, max_batch, max_seq)
    settings: dict[str, str | int | float | bool] = {
        "gpu": gpu.name,
        "driver": gpu.driver,
        "strongly_typed": True,
        "plugin_sha256": sha256_file(plugin),
        "alias_caches": alias_caches,
    }
    if builder_memory is not None:
        settings["builder_memory"] = builder_memory
    # They take their places one right after the other, then the manifest does: a kill in between leaves an
    # engine whose hashes are not those of the manifest.
    with (
        atomic_directory(bundle.path / DIRECTORY, ENGINE) as directory,
        atomic_file(bundle.path / NETWORK_FILE) as network,
    ):
        model = network_for_parser(bundle, directory / INTEGER_WEIGHTS)
        require_parsed(tensorrt, polygraphy, model, version_of(tensorrt))
        # Beside the weights it refers to, for as long as it is parsed.
        source = bundle.path / f".{Backend.TENSORRT}.onnx"
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(source.unlink, missing_ok=True)
            place_kernels(specs(bundle), gpu, kernels, directory / KERNELS)
            weights = os.path.relpath(directory.resolve(), bundle.path.resolve())
            save(relocated(model, DIRECTORY, str(directory.resolve()), weights), source)
            plan = build_plan(
                tensorrt,
                polygraphy,
                source,
                shapes,
                plugin_layers=bundle.manifest.num_layers,
                builder_memory=builder_memory,
                alias_caches=alias_caches,
                timing_cache=_timing_cache_path(tensorrt),
            )
        (directory / PLAN_FILE).write_bytes(plan)
        _prove(tensorrt, bundle, plan, max_batch, max_seq)
        # trtexec is run in the bundle's directory.
        save(model, network)
        files = {f"{DIRECTORY}/{name}": record for name, record in record_files(directory, directory).items()}
        files[NETWORK_FILE] = FileRecord(sha256=sha256_file(network), size=network.stat().st_size)
    settings["trtexec"] = trtexec_line(shapes, plugin, builder_memory, alias_caches=alias_caches)
    return EngineRecord(
        backend=Backend.TENSORRT,
        runtime_version=tensorrt.__version__,
        model_sha256=bundle.manifest.files[MODEL_FILE].sha256,
        max_batch=max_batch,
        max_seq=max_seq,
        op_version=bundle.manifest.op_version,
        gpu_architecture=gpu.target,
        plugin_version=PLUGIN_VERSION,
        files=files,
        settings=settings,
        created_with=CREATED_WITH,
    )


def require_supported(bundle: Bundle) -> None:
    """Refuse what these engines cannot do, whatever the machine.

    Raises:
        ChaiError: layers share KV caches, rotary factors follow the length of a row, or the bundle has
            version 1 of the op.
    """
    if bundle.manifest.kv_source_layers is not None:
        raise ChaiError(
            f"{bundle.path} has layers that read another layer's KV cache, and {SHARED_OP_TYPE} has no "
            "TensorRT plugin; use --backend onnxruntime"
        )
    if bundle.manifest.switch_lengths:
        raise ChaiError(
            f"{bundle.path} has rotary factors that follow the length of a row, which TensorRT engines "
            "cannot do yet; use --backend onnxruntime"
        )


def place_kernels(wanted: Mapping[str, Spec], gpu: Gpu, given: Path | None, directory: Path) -> None:
    """Compile the kernels of each form into a directory of its name, or copy ``given`` ones that fit.

    Raises:
        ChaiError: the given kernels are unreadable or for another GPU or model.
    """
    for form, spec in wanted.items():
        target = directory / form
        if given is None:
            compile_kernels(spec, gpu.architecture, target)
        else:
            own = given / form
            _copy_kernels(spec, gpu, own if own.is_dir() else given, target)


def _copy_kernels(spec: Spec, gpu: Gpu, given: Path, directory: Path) -> None:
    again = "compile them for this machine or leave --kernels out"
    try:
        index = read_json(given / INDEX_NAME, fix=again)
        found, compiled = int(index["architecture"]), Spec(**index["spec"])
        names = [INDEX_NAME, *(Path(launch["file"]).name for launch in index["launches"])]
    except MissingFileError as error:
        raise ChaiError(f"{given} holds no kernels ({INDEX_NAME} is missing); {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ChaiError(f"{given} holds no kernels that can be read ({reason(error)}); {again}") from error
    if found != gpu.architecture:
        raise ChaiError(f"the kernels in {given} are for sm_{found} and this GPU is {gpu.target}; {again}")
    if compiled != spec:
        raise ChaiError(f"the kernels in {given} are for {compiled} and the model needs {spec}; {again}")
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_bytes(read_bytes(given / name, fix=again))


def network_for_parser(bundle: Bundle, weights: Path) -> onnx.ModelProto:
    """The graph for TensorRT's parser, with the plugin.

    Its kernels and integer weights lie in the engine's directory of the bundle, where the model is saved.

    Args:
        bundle: whose graph.
        weights: file to write integer weights to, if there are any.

    Raises:
        ChaiError: it has operators that are not ONNX's and cannot be written as such.
    """
    model = plugin_network(bundle, PLUGIN_VERSION, PLUGIN_NAMESPACE, f"{DIRECTORY}/{KERNELS}")
    lower_operators(model, bundle.path, weights, f"{DIRECTORY}/{INTEGER_WEIGHTS}")
    require_known_domains(model)
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph without its external data."""
    path.write_bytes(model.SerializeToString())


def build_plan(
    tensorrt: Any,
    polygraphy: Any,
    source: Path,
    shapes: tuple[Mapping[str, Range], ...],
    *,
    plugin_layers: int,
    builder_memory: int | None,
    alias_caches: bool,
    timing_cache: Path | None,
) -> Any:
    """Parse and build.

    Args:
        tensorrt: the module, or TensorRT-RTX's.
        polygraphy: ``polygraphy.backend.trt``.
        source: the ONNX file.
        shapes: by input name, one mapping per profile.
        plugin_layers: attentions in the network.
        builder_memory: bytes of workspace. None is what TensorRT likes.
        alias_caches: as :func:`build_tensorrt`.
        timing_cache: file of measured kernel times, read and written; None for none.

    Returns:
        The engine's bytes.

    Raises:
        ChaiError: the parser does not take the graph, or no engine could be built.
    """
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    recorder = error_recorder(tensorrt)
    cache = None if timing_cache is None else str(timing_cache)
    # polygraphy's log goes to stdout, which is for results.
    with contextlib.redirect_stdout(sys.stderr), G_LOGGER.verbosity(G_LOGGER.ERROR):
        network = parse_network(tensorrt, polygraphy, source, plugin_layers)
        network[0].error_recorder = recorder
        limits = {} if builder_memory is None else {tensorrt.MemoryPoolType.WORKSPACE: builder_memory}
        with BuildProgress(tensorrt) as progress:
            config = polygraphy.CreateConfig(
                profiles=[_polygraphy_profile(polygraphy, profile) for profile in shapes],
                memory_pool_limits=limits,
                load_timing_cache=cache,
                progress_monitor=progress.monitor,
            )
            if alias_caches:
                config = with_aliases(tensorrt, polygraphy, config)
            try:
                return polygraphy.engine_bytes_from_network(network, config=config, save_timing_cache=cache)
            except PolygraphyException as error:
                raise build_error(recorder.messages, str(error)) from error


def with_aliases(tensorrt: Any, polygraphy: Any, config: Any) -> Any:
    """A configuration in which TensorRT takes notice of outputs that are a plugin's inputs.

    By TensorRT's headers it asks the plugin in this case only, but builders were seen to refuse a plugin
    that would answer, as ours would.
    """

    def switch_on(builder: Any, network: Any, builder_config: Any) -> None:
        builder_config.set_preview_feature(tensorrt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)

    return polygraphy.PostprocessConfig(config, func=switch_on)


def _polygraphy_profile(polygraphy: Any, shapes: Mapping[str, Range]) -> Any:
    profile = polygraphy.Profile()
    for name, shape in shapes.items():
        profile.add(name, shape.least, shape.likely, shape.most)
    return profile


def build_error(reports: Sequence[str], otherwise: str) -> ChaiError:
    """What TensorRT reported last, which is why it gave up, with what can be done about it.

    Reports before that are of attempts that it went on from. Without any there is what the caller was told.
    """
    cause = "; ".join(map(reason, reports[-_CAUSES:])) or reason(otherwise)
    if any("out of memory" in m.lower() or "outofmemory" in m.lower() for m in (*reports, otherwise)):
        return ChaiError(
            f"GPU memory ran out while building ({cause}); lower --max-batch, --max-seq or --builder-memory, "
            "or free the GPU"
        )
    if any("ALIASED_PLUGIN_IO" in message for message in reports):
        return ChaiError(f"TensorRT could not build the engine ({cause}); leave --no-alias-caches out")
    return ChaiError(f"TensorRT could not build the engine ({cause}); see its messages above")


def _prove(tensorrt: Any, bundle: Bundle, plan: Any, max_batch: int, max_seq: int) -> None:
    """Run the engine, and compare it with ONNX Runtime, before it counts as built.

    Raises:
        ChaiError: the engine does not load, or does not compute what the bundle says.
    """
    from chai_export.runtime.tensorrt_session import TensorRtSession, load_engine

    engine = load_engine(tensorrt, bytes(plan))
    prove_engine(
        bundle,
        lambda heads: TensorRtSession(bundle.manifest, heads, engine, tensorrt=tensorrt),
        max_batch,
        max_seq,
    )


def _timing_cache_path(tensorrt: Any) -> Path:
    """Measured kernel times, kept between builds; TensorRT itself ignores what another GPU measured."""

    path = cache_path().parent / f"tensorrt-{tensorrt.__version__}.timing"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def trtexec_line(
    shapes: tuple[Mapping[str, Range], ...],
    plugin: Path,
    builder_memory: int | None,
    *,
    alias_caches: bool,
) -> str:
    """The command that builds an equal engine, to be run in the bundle's directory.

    trtexec would multiply in TF32, and run the engine with caches of its own afterwards.
    """
    words = ["trtexec", f"--onnx={NETWORK_FILE}", f"--dynamicPlugins={plugin}"]
    for index, profile in enumerate(shapes):
        words += [f"--profile={index}", *trtexec_shapes(profile)]
    if builder_memory is not None:
        words.append(f"--memPoolSize=workspace:{builder_memory / _MEBI:g}M")
    if alias_caches:
        words.append("--preview=+aliasedPluginIO1003")
    words += ["--stronglyTyped", "--noTF32", "--skipInference", f"--saveEngine={PLAN_FILE}"]
    return shlex.join(words)
