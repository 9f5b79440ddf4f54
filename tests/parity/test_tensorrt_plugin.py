"""libchai_tensorrt.so in the real lean runtime of TensorRT, on a machine without a GPU."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_export.kernels.blocks import choose
from chai_export.kernels.launches import build_program
from chai_export.kernels.spec import Shape, Spec
from tests.helpers.tensorrt_probe import (
    BOOL,
    CHW2,
    FLOAT,
    HALF,
    HWC8,
    INT8,
    INT32,
    LIBRARY,
    LINEAR,
    NAME,
    SIGNATURE,
    Probe,
    build_probe,
    types_of,
)

SPEC = Spec(4, 2, 16, 8, "float16", 5, key_bits=8, value_bits=4, group_size=8, softcap=True, sinks=True)
ARCHITECTURE = 90
KERNELS = ["append_kernel", "decode_scores_kernel"]
"""The index has the tensors and the workspace of all, however few were compiled."""

trt: Any
try:
    trt = importlib.import_module("tensorrt_lean_bindings")
except ImportError:
    trt = None

pytestmark = [
    pytest.mark.skipif(trt is None, reason="no lean runtime of TensorRT: pip install 'chai-export[dev]'"),
    pytest.mark.skipif(
        not LIBRARY.is_file(),
        reason="libchai_tensorrt.so was not built: set TensorRT_ROOT to TensorRT's headers and install again",
    ),
]


@pytest.fixture(scope="module")
def creator() -> Iterator[Any]:
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(LIBRARY))
    assert handle is not None
    yield registry.get_creator(*NAME)
    registry.deregister_library(handle)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chai_export.kernels.ahead_of_time import compile as compile_kernels

    pytest.importorskip("triton", reason="Triton is not installed: pip install 'chai-export[dev]'")
    directory = tmp_path_factory.mktemp("kernels")
    return compile_kernels(SPEC, ARCHITECTURE, directory, only=KERNELS).parent


def of_spec(kernels: Path, directory: Path, **changes: Any) -> Path:
    """The same kernels under an index that says another spec: nothing here runs them."""
    shutil.copytree(kernels, directory, dirs_exist_ok=True)
    index = json.loads((kernels / "index.json").read_text())
    index["spec"].update(changes)
    (directory / "index.json").write_text(json.dumps(index))
    return directory


INTEGERS = {"probe_tokens": 5, "online": 1, "key_bits": 8, "value_bits": 4, "group": 8, "window": 0}


def node_fields(directory: Path, **changes: Any) -> dict[str, tuple[Any, Any]]:
    values = {
        "scale": np.array([0.0], np.float32),
        "softcap": np.array([2.0], np.float32),
        **{name: np.array([value], np.int32) for name, value in INTEGERS.items()},
        "kernel_directory": str(directory).encode(),
        **changes,
    }
    types = {
        "scale": trt.PluginFieldType.FLOAT32,
        "softcap": trt.PluginFieldType.FLOAT32,
        "kernel_directory": trt.PluginFieldType.CHAR,
        "kernels": trt.PluginFieldType.UNKNOWN,
    }
    return {k: (v, types.get(k, trt.PluginFieldType.INT32)) for k, v in values.items() if v is not None}


def create(creator: Any, fields: dict[str, tuple[Any, Any]], phase: str = "BUILD") -> Any:
    collection = trt.PluginFieldCollection([trt.PluginField(n, v, t) for n, (v, t) in fields.items()])
    return creator.create_plugin("layer", collection, getattr(trt.TensorRTPhase, phase))


def test_the_library_registers_its_creator_with_name_version_and_the_op_s_attributes(creator: Any) -> None:
    listed = [(c.name, c.plugin_version, c.plugin_namespace) for c in trt.get_plugin_registry().all_creators]
    assert listed.count(NAME) == 1
    names = [field.name for field in creator.field_names]
    assert names == [*SIGNATURE.attribute_names, "kernel_directory"]
    kinds = trt.PluginFieldType
    floats = {field.name for field in creator.field_names if field.type == kinds.FLOAT32}
    assert floats == {"scale", "softcap"}


LOADING = """
import ctypes, sys
import tensorrt_lean_bindings as trt
registry = trt.get_plugin_registry()
def count():
    return sum(c.name == "ClusteredHeadAttention" for c in registry.all_creators)
for step in sys.argv[2:]:
    if step == "dlopen":
        ctypes.CDLL(sys.argv[1])
    elif step == "load":
        handle = registry.load_library(sys.argv[1])
    elif step == "unload":
        registry.deregister_library(handle)
    print(count())
"""


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        (["dlopen"], [1]),
        (["load"], [1]),
        (["dlopen", "load"], [1, 1]),
        (["load", "dlopen"], [1, 1]),
        (["load", "unload", "load"], [1, 0, 1]),
        (["dlopen", "dlopen"], [1, 1]),
        # It registers by itself once in a process: what was taken back is loaded again by the registry.
        (["load", "unload", "dlopen", "load"], [1, 0, 0, 1]),
    ],
)
def test_both_ways_of_loading_register_once(steps: list[str], counts: list[int]) -> None:
    command = [sys.executable, "-c", LOADING, str(LIBRARY), *steps]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert [int(line) for line in done.stdout.split()] == counts


def test_the_library_stays_where_it_is_when_it_is_closed() -> None:
    """TensorRT keeps pointers into it."""
    code = f"""
import _ctypes, ctypes
library = ctypes.CDLL({str(LIBRARY)!r})
_ctypes.dlclose(library._handle)
print(any({LIBRARY.name!r} in line for line in open("/proc/self/maps")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "True"


def test_the_library_loads_without_tensorrt_and_without_a_driver() -> None:
    code = f"import ctypes; print(ctypes.CDLL({str(LIBRARY)!r}).chai_tensorrt_major())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) >= 10


def test_a_plugin_is_created_from_the_attributes_of_a_node(creator: Any, kernels: Path) -> None:
    plugin = create(creator, node_fields(kernels))
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == NAME
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    assert isinstance(build, trt.IPluginV3OneBuildV2)
    assert build.num_outputs == 6
    assert plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME) is not None


@pytest.mark.parametrize("missing", ["scale", "softcap", *INTEGERS, "kernel_directory"])
def test_a_missing_field_is_an_error_that_names_it(
    creator: Any, kernels: Path, missing: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert create(creator, node_fields(kernels, **{missing: None})) is None
    assert f"field '{missing}' is missing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online": np.array([2], np.int32)}, "field 'online' must be 0 or 1"),
        ({"probe_tokens": np.array([4], np.int32)}, "compiled for probe_tokens 5 and the node has 4"),
        ({"scale": np.array([np.nan], np.float32)}, "field 'scale' must be finite"),
        ({"scale": np.array([1, 2], np.float32)}, "field 'scale' must hold one value"),
        ({"kernel_directory": b"/nowhere"}, "cannot read /nowhere/index.json"),
        ({"kernels": b"damaged" * 20, "kernel_directory": None}, "the kernels in this engine are damaged"),
        ({"slots": np.array([2], np.int32)}, "unknown field 'slots'"),
        ({"window": np.array([-1], np.int32)}, "field 'window' must not be negative"),
        ({"key_bits": np.array([4], np.int32)}, "compiled for key_bits 8 and the node has 4"),
        ({"group": np.array([4], np.int32)}, "compiled for group 8 and the node has 4"),
        ({"softcap": np.array([0.0], np.float32)}, "for a soft cap, 0 or 1: 1 and the node has 0"),
    ],
)
def test_a_wrong_field_is_an_error_and_no_plugin(
    creator: Any, kernels: Path, changes: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert create(creator, node_fields(kernels, **changes)) is None
    assert message in capfd.readouterr().err


def test_kernels_changed_after_compilation_are_refused(
    creator: Any, kernels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(kernels, tmp_path, dirs_exist_ok=True)
    cubin = next(tmp_path.glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"\0\1")
    assert create(creator, node_fields(tmp_path)) is None
    assert "is not the file the index was written for" in capfd.readouterr().err


@pytest.fixture(scope="module")
def probe(creator: Any, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    library = build_probe(tmp_path_factory.mktemp("probe"))
    if library is None:
        pytest.skip("compiling the probe needs g++, CUDA's headers and TensorRT_ROOT (TensorRT's headers)")
    return Probe(library)


def test_a_clone_and_a_restored_plugin_carry_every_field(probe: Probe, kernels: Path) -> None:
    plugin = probe.create(kernels, SPEC, scale=0.35, online=0, window=48)
    clone, restored = probe.clone(plugin), probe.restore(plugin)
    fields = probe.fields(plugin)
    assert set(fields) == {*SIGNATURE.attribute_names, "kernels"}
    assert np.frombuffer(fields["scale"], np.float32)[0] == np.float32(0.35)
    assert np.frombuffer(fields["softcap"], np.float32)[0] == 2.0
    for name, value in (INTEGERS | {"online": 0, "window": 48}).items():
        assert np.frombuffer(fields[name], np.int32)[0] == value
    for cubin in kernels.glob("*.cubin"):
        assert cubin.read_bytes() in fields["kernels"]
    assert probe.fields(clone) == fields
    assert probe.fields(restored) == fields
    probe.destroy(plugin)
    assert probe.fields(clone) == fields
    probe.destroy(clone, restored)


def test_an_engine_needs_no_kernel_directory(probe: Probe, kernels: Path, tmp_path: Path) -> None:
    directory = tmp_path / "kernels"
    shutil.copytree(kernels, directory)
    plugin = probe.create(directory, SPEC)
    shutil.rmtree(directory)
    restored = probe.restore(plugin)
    assert restored.value
    probe.destroy(plugin, restored)


FORMS = {
    "as compiled": SPEC,
    "float32": Spec(
        4, 2, 16, 8, "float32", 5, key_bits=8, value_bits=4, group_size=8, softcap=True, sinks=True
    ),
    "as given, slopes": Spec(4, 2, 16, 8, "bfloat16", 5, group_size=8, slopes=True),
    "16 bits": Spec(4, 2, 16, 8, "bfloat16", 5, key_bits=16, value_bits=8, group_size=8),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_node_has_the_tensors_of_its_form_in_the_op_s_order(
    probe: Probe, kernels: Path, tmp_path: Path, form: str
) -> None:
    spec = FORMS[form]
    plugin = probe.create(of_spec(kernels, tmp_path, **vars(spec)), spec)
    assert plugin.value
    inputs, outputs = types_of(spec)
    assert probe.output_types(plugin, inputs) == outputs
    for position in range(len(inputs)):
        wrong = list(inputs)
        wrong[position] = BOOL
        assert probe.output_types(plugin, wrong) is None
    probe.destroy(plugin)


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({}, True),
        ({"types": {0: INT8}}, False),
        ({"types": {3: FLOAT}}, False),
        ({"types": {5: FLOAT}}, False),
        ({"types": {7: BOOL}}, False),
        ({"types": {17: HALF}}, False),
        ({"formats": {0: CHW2}}, False),
        ({"formats": {3: HWC8}}, False),
        ({"formats": {13: CHW2}}, False),
        ({"formats": {17: HWC8}}, False),
    ],
)
def test_the_format_table(
    probe: Probe, kernels: Path, change: dict[str, dict[int, int]], accepted: bool
) -> None:
    plugin = probe.create(kernels, SPEC)
    inputs, outputs = types_of(SPEC)
    types, layouts = [*inputs, *outputs], [LINEAR] * 18
    assert len(types) == 18
    assert types[7] == types[17] == INT32
    for position, value in change.get("types", {}).items():
        types[position] = value
    for position, value in change.get("formats", {}).items():
        layouts[position] = value
    assert all(probe.supports(plugin, p, types, layouts) for p in range(18)) == accepted
    probe.destroy(plugin)


@pytest.mark.parametrize(
    "shape",
    [Shape(1, 1, 1, 64, 3, 32), Shape(8, 512, 2, 4096, 300, 128), Shape(3, 7, 1, 99, 40, 3)],
)
def test_workspace_is_what_the_python_launcher_uses(probe: Probe, kernels: Path, shape: Shape) -> None:
    plugin = probe.create(kernels, SPEC)
    program = build_program(SPEC, choose(SPEC, ARCHITECTURE))
    assert probe.workspace(plugin, SPEC, shape) == program.workspace_bytes(shape) > 0
    probe.destroy(plugin)


def test_kernels_of_another_version_of_the_op_are_refused(
    probe: Probe, kernels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(kernels, tmp_path, dirs_exist_ok=True)
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace("chai-kernels/2", "chai-kernels/1"))
    assert not probe.create(tmp_path, SPEC).value
    assert "has format 'chai-kernels/1' and this library reads 'chai-kernels/2'" in capfd.readouterr().err


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_plugins_leave_nothing_behind(probe: Probe, kernels: Path) -> None:
    image = len(probe.fields(first := probe.create(kernels, SPEC))["kernels"])

    def cycle() -> None:
        plugin = probe.create(kernels, SPEC)
        clone, restored = probe.clone(plugin), probe.restore(plugin)
        probe.destroy(plugin, clone, restored)

    for _ in range(50):
        cycle()
    gc.collect()
    before = resident_bytes()
    for _ in range(1000):
        cycle()
    assert resident_bytes() - before < 100 * image  # a tenth of one leaked image per cycle would show
    probe.destroy(first)


def test_attaching_without_a_driver_is_an_error_and_enqueue_too(
    probe: Probe, kernels: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    plugin = probe.create(kernels, SPEC)
    assert probe.attach(plugin).value is None
    assert (
        "loading kernels: loading append_kernel.cubin failed: CUDA driver version" in capfd.readouterr().err
    )
    shape = Shape(1, 1, 1, 64, 2, 32)
    inputs, outputs = ([place << 20] * len(types) for place, types in enumerate(types_of(SPEC), 1))
    assert not probe.enqueue(plugin, SPEC, shape, inputs, outputs, 1 << 20, 0)
    assert "ClusteredHeadAttention, enqueue: " in capfd.readouterr().err
    probe.destroy(plugin)
