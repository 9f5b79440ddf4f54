"""A TensorRT plugin's C++ interface for tests, through plugins/tests/op/tensorrt/probe.cpp and ctypes."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chai_export
from chai_export.kernels.launches import tensor_types
from chai_export.kernels.spec import Shape, Spec
from chai_export.op.schema import signature

LIBRARY = Path(chai_export.__file__).parent / "libchai_tensorrt.so"
PROBE_SOURCE = Path(__file__).parents[2] / "plugins/tests/op/tensorrt/probe.cpp"
PROBE_VARIABLE = "CHAI_TENSORRT_PROBE"
"""Names a probe that was compiled before, for machines without TensorRT's headers."""
NAME = ("ClusteredHeadAttention", "2", "chai")
FLOAT, HALF, INT8, INT32, BOOL, BF16 = 0, 1, 2, 3, 4, 7
"""Values of nvinfer1::DataType."""
LINEAR, CHW2, HWC8 = 0, 1, 2
"""Values of nvinfer1::TensorFormat."""
UNKNOWN_FIELD = 8
"""nvinfer1::PluginFieldType::kUNKNOWN: a field of bytes."""
DATA_TYPES = {
    "float32": FLOAT,
    "float16": HALF,
    "bfloat16": BF16,
    "int8": INT8,
    "uint8": INT8,
    "int32": INT32,
}
"""Codes of 4 bits are bytes to TensorRT, whose kUINT8 no plugin gets."""
SIGNATURE = signature()


def cuda_headers() -> Path | None:
    """Directory of cuda_runtime_api.h."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    found = (Path(home) / "include" for home in homes if home)
    return next((path for path in found if (path / "cuda_runtime_api.h").is_file()), None)


def build_probe(directory: Path) -> Path | None:
    """Compile the probe, or None where that is not possible."""
    if given := os.environ.get(PROBE_VARIABLE):
        return Path(given)
    root = os.environ.get("TensorRT_ROOT")  # noqa: SIM112 - CMake's spelling
    compiler, cuda = shutil.which("g++"), cuda_headers()
    if not root or compiler is None or cuda is None:
        return None
    output = directory / "libprobe.so"
    includes = [f"-isystem{Path(root) / 'include'}", f"-isystem{cuda}"]
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *includes, str(PROBE_SOURCE), "-o", str(output)]
    subprocess.run(command, check=True, timeout=300)
    return output


def inputs_of(spec: Spec, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs that a node of this form has, by name in the order of the op."""
    b, s, n, r, length = shape.batch, shape.tokens, shape.pages, shape.kept, shape.page_length
    h, g, d, dv = spec.num_query_heads, spec.num_kv_heads, spec.head_dim, spec.value_head_dim
    key, value = spec.storage_k, spec.storage_v
    shapes: dict[str, tuple[int, ...]] = {
        "query": (b, h, s, d),
        "key": (b, g, s, d),
        "value": (b, g, s, dv),
        "key_cache": (n, r, length, key.columns),
        "value_cache": (n, g, length, value.columns),
        "key_scales": (n, r, length, key.scale_columns),
        "value_scales": (n, g, length, value.scale_columns),
        "page_table": (b, shape.row_pages),
        "past_head_map": (b, h),
        "past_lengths": (b,),
        "lengths": (b,),
        "sinks": (h,),
        "alibi_slopes": (h,),
    }
    types = tensor_types(spec)
    return {name: shapes[name] for name in SIGNATURE.input_names if name in types}


def types_of(spec: Spec) -> tuple[list[int], list[int]]:
    """DataTypes of a node's inputs and outputs."""
    types = tensor_types(spec)
    follows = [parameter.follows or "query" for parameter in SIGNATURE.outputs]
    return (
        [DATA_TYPES[types[name]] for name in SIGNATURE.input_names if name in types],
        [DATA_TYPES[types[name]] for name in follows if name in types],
    )


def _integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int32 * len(values))(*values)


def _flat_dims(spec: Spec, shape: Shape) -> Any:
    flat = [size for dims in inputs_of(spec, shape).values() for size in (*dims, 0, 0, 0)[:4]]
    return (ctypes.c_int64 * len(flat))(*flat)


class Probe:
    """The plugin's C++ interface, through plugins/tests/op/tensorrt/probe.cpp."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        runtime = next(
            Path(importlib.import_module("tensorrt_lean_libs").__file__).parent.glob("libnvinfer_lean*")
        )
        get_registry = ctypes.CDLL(str(runtime)).getPluginRegistry
        get_registry.restype = ctypes.c_void_p
        self._registry = ctypes.c_void_p(get_registry())
        for name in ("create", "restore", "clone", "attach"):
            self._function(name).restype = ctypes.c_void_p
        self._function("workspace").restype = ctypes.c_int64

    def _function(self, name: str) -> Any:
        return getattr(self._library, f"probe_{name}")

    def create(
        self,
        directory: Path,
        spec: Spec,
        *,
        scale: float = 0.0,
        online: int = 1,
        window: int = 0,
        softcap: float | None = None,
    ) -> ctypes.c_void_p:
        """A plugin whose attributes are those of the kernels; null where it refuses."""
        if softcap is None:
            softcap = 2.0 if spec.softcap else 0.0
        integers = (spec.probe_tokens, online, spec.key_bits, spec.value_bits, spec.group_size, window)
        floats = (ctypes.c_float * 2)(scale, softcap)
        path = str(directory).encode()
        return ctypes.c_void_p(self._function("create")(self._registry, path, _integers(integers), floats))

    def restore(self, plugin: ctypes.c_void_p) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._function("restore")(self._registry, plugin))

    def clone(self, plugin: ctypes.c_void_p) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._function("clone")(plugin))

    def destroy(self, *plugins: ctypes.c_void_p) -> None:
        for plugin in plugins:
            self._function("destroy")(plugin)

    def fields(self, plugin: ctypes.c_void_p) -> dict[str, bytes]:
        name, data = ctypes.c_char_p(), ctypes.c_void_p()
        kind, length = ctypes.c_int32(), ctypes.c_int32()
        out = [ctypes.byref(value) for value in (name, kind, length, data)]
        found = {}
        for i in range(self._function("field")(plugin, 99, *out)):
            self._function("field")(plugin, i, *out)
            size = length.value if kind.value == UNKNOWN_FIELD else 4 * length.value
            found[name.value.decode()] = ctypes.string_at(data, size)
        return found

    def num_outputs(self, plugin: ctypes.c_void_p) -> int:
        return int(self._function("num_outputs")(plugin))

    def output_types(self, plugin: ctypes.c_void_p, inputs: list[int]) -> list[int] | None:
        count = self.num_outputs(plugin)
        outputs = (ctypes.c_int32 * count)()
        status = self._function("output_types")(plugin, _integers(inputs), len(inputs), outputs, count)
        return None if status else list(outputs)

    def supports(self, plugin: ctypes.c_void_p, position: int, types: list[int], formats: list[int]) -> bool:
        """Whether the plugin takes a combination of types and formats of all inputs and outputs."""
        outputs = self.num_outputs(plugin)
        arrays = [_integers(values) for values in (types, formats)]
        return bool(self._function("supports")(plugin, position, *arrays, len(types) - outputs, outputs))

    def workspace(self, plugin: ctypes.c_void_p, spec: Spec, shape: Shape) -> int:
        dims, count = _flat_dims(spec, shape), len(inputs_of(spec, shape))
        return int(self._function("workspace")(plugin, dims, count, self.num_outputs(plugin)))

    def attach(self, plugin: ctypes.c_void_p) -> ctypes.c_void_p:
        """The clone for an execution context: on a GPU this loads the kernels."""
        return ctypes.c_void_p(self._function("attach")(plugin))

    def enqueue(
        self,
        plugin: ctypes.c_void_p,
        spec: Spec,
        shape: Shape,
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> bool:
        """Run the plugin on device addresses; True unless it reports an error."""
        types, _ = types_of(spec)
        status = self._function("enqueue")(
            plugin,
            _flat_dims(spec, shape),
            _integers(types),
            len(types),
            (ctypes.c_void_p * len(inputs))(*inputs),
            (ctypes.c_void_p * len(outputs))(*outputs),
            ctypes.c_void_p(workspace),
            ctypes.c_void_p(stream),
        )
        return int(status) == 0
