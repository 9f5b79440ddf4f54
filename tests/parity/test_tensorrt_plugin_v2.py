"""Version 2 of the plugin in the real lean runtime of TensorRT, with kernels that were compiled for it."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chai_export.kernels.blocks import choose
from chai_export.kernels.launches import build_program, tensor_types
from chai_export.kernels.spec import Shape, Spec
from chai_export.op.schema import signature
from tests.helpers.tensorrt_probe import (
    BF16,
    FLOAT,
    HALF,
    INT8,
    INT32,
    LIBRARY,
    LIBRARY_V2,
    Probe,
    build_probe,
)

ARCHITECTURE = 90
SIGNATURE = signature()
SPEC = Spec(4, 2, 16, 8, "float16", 5, key_bits=8, value_bits=4, group_size=8, softcap=True, sinks=True)
PLUGIN_TYPES = {
    "float32": FLOAT,
    "float16": HALF,
    "bfloat16": BF16,
    "int8": INT8,
    "uint8": INT8,
    "int32": INT32,
}
"""Codes of 4 bits are bytes to TensorRT, whose kUINT8 no plugin gets."""

trt: Any
try:
    trt = importlib.import_module("tensorrt_lean_bindings")
except ImportError:
    trt = None

pytestmark = [
    pytest.mark.skipif(trt is None, reason="no lean runtime of TensorRT: pip install 'chai-export[dev]'"),
    pytest.mark.skipif(
        not LIBRARY_V2.is_file(),
        reason="no libchai_tensorrt_v2.so: set TensorRT_ROOT to TensorRT's headers and install again",
    ),
]


@pytest.fixture(scope="module")
def creator() -> Iterator[Any]:
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(LIBRARY_V2))
    assert handle is not None
    yield registry.get_creator("ClusteredHeadAttention", "2", "chai")
    registry.deregister_library(handle)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kernel is enough: the index has the tensors and the workspace of all."""
    from chai_export.kernels.ahead_of_time import compile as compile_kernels

    pytest.importorskip("triton", reason="Triton is not installed: pip install 'chai-export[dev]'")
    directory = tmp_path_factory.mktemp("kernels")
    return compile_kernels(SPEC, ARCHITECTURE, directory, only=["append_kernel"]).parent


class ProbeOfVersion2(Probe):
    """Adds what nodes of version 2 need, whose number of tensors varies."""

    def create_v2(
        self, directory: Path, spec: Spec, window: int = 0, softcap: float = 2.0
    ) -> ctypes.c_void_p:
        integers = (spec.probe_tokens, 1, spec.key_bits, spec.value_bits, spec.group_size, window)
        function = self._function("create_v2")
        function.restype = ctypes.c_void_p
        pointer = function(
            self._registry,
            str(directory).encode(),
            (ctypes.c_int32 * 6)(*integers),
            (ctypes.c_float * 2)(0.0, softcap),
        )
        return ctypes.c_void_p(pointer)

    def num_outputs(self, plugin: ctypes.c_void_p) -> int:
        return int(self._function("num_outputs")(plugin))

    def output_types_of(self, plugin: ctypes.c_void_p, inputs: list[int]) -> list[int] | None:
        count = self.num_outputs(plugin)
        outputs = (ctypes.c_int32 * count)()
        given = (ctypes.c_int32 * len(inputs))(*inputs)
        status = self._function("output_types_of")(plugin, given, len(inputs), outputs, count)
        return None if status else list(outputs)

    def workspace_of(self, plugin: ctypes.c_void_p, dims: list[tuple[int, ...]]) -> int:
        flat = [size for shape in dims for size in (*shape, 0, 0, 0)[:4]]
        function = self._function("workspace_of")
        function.restype = ctypes.c_int64
        given = (ctypes.c_int64 * len(flat))(*flat)
        return int(function(plugin, given, len(dims), self.num_outputs(plugin)))


@pytest.fixture(scope="module")
def probe(creator: Any, tmp_path_factory: pytest.TempPathFactory) -> ProbeOfVersion2:
    library = build_probe(tmp_path_factory.mktemp("probe"))
    if library is None:
        pytest.skip("compiling the probe needs g++, CUDA's headers and TensorRT_ROOT (TensorRT's headers)")
    return ProbeOfVersion2(library)


def dims_of(shape: Shape) -> list[tuple[int, ...]]:
    """Shapes of the inputs that a node of SPEC has, in the order of the op."""
    b, s, n, r, length = shape.batch, shape.tokens, shape.pages, shape.kept, shape.page_length
    h, g, d, dv = SPEC.num_query_heads, SPEC.num_kv_heads, SPEC.head_dim, SPEC.value_head_dim
    key, value = SPEC.storage_k, SPEC.storage_v
    return [
        (b, h, s, d), (b, g, s, d), (b, g, s, dv), (n, r, length, key.columns), (n, g, length, value.columns),
        (n, r, length, key.scale_columns), (n, g, length, value.scale_columns), (b, shape.row_pages), (b, h),
        (b,), (b,), (h,),
    ]  # fmt: skip


def test_the_library_registers_version_2_alone_and_again_after_it_was_unloaded() -> None:
    code = f"""
import tensorrt_lean_bindings as trt
registry = trt.get_plugin_registry()
def versions():
    return [c.plugin_version for c in registry.all_creators if c.name == "ClusteredHeadAttention"]
for _ in range(3):
    handle = registry.load_library({str(LIBRARY_V2)!r})
    assert versions() == ["2"], versions()
    registry.deregister_library(handle)
    assert not versions()
first = registry.load_library({str(LIBRARY)!r})
second = registry.load_library({str(LIBRARY_V2)!r})
print(sorted(versions()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "['1', '2']", done.stderr


def test_the_creator_advertises_the_attributes_of_the_op(creator: Any) -> None:
    names = [field.name for field in creator.field_names]
    assert names == [*SIGNATURE.attribute_names, "kernel_directory"]
    assert creator.plugin_version == "2"


def test_a_node_has_the_tensors_of_its_form_in_the_op_s_order(probe: ProbeOfVersion2, kernels: Path) -> None:
    plugin = probe.create_v2(kernels, SPEC)
    assert plugin.value
    types = tensor_types(SPEC)
    inputs = [PLUGIN_TYPES[types[name]] for name in SIGNATURE.input_names if name in types]
    follows = [(parameter.follows or "query") for parameter in SIGNATURE.outputs]
    assert probe.output_types_of(plugin, inputs) == [PLUGIN_TYPES[types[name]] for name in follows]
    for position in range(len(inputs)):
        wrong = list(inputs)
        wrong[position] = FLOAT
        assert probe.output_types_of(plugin, wrong) is None
    probe.destroy(plugin)


@pytest.mark.parametrize(
    "shape",
    [Shape(1, 1, 1, 64, 3, 32), Shape(8, 512, 2, 4096, 300, 128), Shape(3, 7, 1, 99, 40, 3)],
)
def test_workspace_is_what_the_python_launcher_uses(
    probe: ProbeOfVersion2, kernels: Path, shape: Shape
) -> None:
    plugin = probe.create_v2(kernels, SPEC)
    program = build_program(SPEC, choose(SPEC, ARCHITECTURE))
    assert probe.workspace_of(plugin, dims_of(shape)) == program.workspace_bytes(shape) > 0
    probe.destroy(plugin)


def test_a_clone_and_a_restored_plugin_carry_every_field(probe: ProbeOfVersion2, kernels: Path) -> None:
    plugin = probe.create_v2(kernels, SPEC, window=48)
    fields = probe.fields(plugin)
    assert set(fields) == {*SIGNATURE.attribute_names, "kernels"}
    assert int.from_bytes(fields["window"], "little") == 48
    clone = probe.clone(plugin)
    probe.destroy(plugin)
    assert probe.fields(clone) == fields
    probe.destroy(clone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, "field 'window' must not be negative"),
        ({"softcap": 0.0}, "compiled for a soft cap, 0 or 1: 1 and the node has 0"),
    ],
)
def test_attributes_that_do_not_fit_the_kernels_are_refused(
    probe: ProbeOfVersion2,
    kernels: Path,
    changes: dict[str, Any],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert not probe.create_v2(kernels, SPEC, **changes).value
    assert message in capfd.readouterr().err


def test_kernels_of_version_1_are_refused(
    probe: ProbeOfVersion2, kernels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in kernels.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace("chai-kernels/2", "chai-kernels/1"))
    assert not probe.create_v2(tmp_path, SPEC).value
    # Version 1 has none of these tensors' attributes; whichever is met first, it is one line.
    assert "the kernels are for version 1 of the op and the node has version 2" in capfd.readouterr().err
