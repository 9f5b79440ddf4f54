"""Every TensorRT and polygraphy name that the Python code uses exists in TensorRT 11.4 and polygraphy 0.53.

TensorRT itself (2 GB, needs a driver) is not there: the names are looked up in the binary of its bindings,
which is a package of its own, and those of the runtime in the lean runtime, which can be imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import pytest

import chai_export

PACKAGE = Path(chai_export.__file__).parent
SOURCES = sorted([*(PACKAGE / "engines").glob("tensorrt*.py"), *(PACKAGE / "runtime").glob("tensorrt*.py")])

OBJECTS = {"tensorrt", "engine", "context", "network", "builder", "parser", "network_input", "layer"}
"""Variables of the sources that hold TensorRT's objects; what is read from them must be TensorRT's."""
METHODS = {
    "ExecutionContextAllocationStrategy",
    "create_execution_context",
    "deserialize_cuda_engine",
    "execute_async_v3",
    "get_creator",
    "get_device_memory_size_for_profile_v2",
    "get_plugin_registry",
    "get_tensor_dtype",
    "get_tensor_name",
    "load_library",
    "num_io_tensors",
    "set_device_memory",
    "set_input_shape",
    "set_optimization_profile_async",
    "set_tensor_address",
}
"""Of the runtime: looked up in the lean runtime as objects."""
OVERRIDDEN = {
    "ILogger": {"log"},
    "IProgressMonitor": {"phase_start", "step_complete", "phase_finish"},
    "IErrorRecorder": {
        "get_num_errors",
        "get_error_code",
        "get_error_desc",
        "has_overflowed",
        "clear",
        "report_error",
    },
}
"""Methods that the sources override."""
DATA_TYPES = {"FLOAT", "HALF", "BF16"}


def trees() -> list[ast.Module]:
    return [ast.parse(source.read_text()) for source in SOURCES]


def chain(node: ast.expr) -> tuple[str, ...]:
    """``a.b.c`` as ("a", "b", "c"); empty for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (start := chain(node.value)):
        return (*start, node.attr)
    return ()


def names_read_from(objects: set[str]) -> set[str]:
    found = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (names := chain(node))[:1] and names[0] in objects:
                found.update(names[1:])
    return found


@pytest.fixture(scope="module")
def bindings() -> bytes:
    try:
        distribution = importlib.metadata.distribution("tensorrt_cu13_bindings")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("TensorRT's bindings are not installed: pip install 'chai-export[dev]'")
    assert distribution.version.startswith("11.4.")
    return Path(str(distribution.locate_file("tensorrt_bindings/tensorrt.so"))).read_bytes()


@pytest.fixture(scope="module")
def lean() -> Any:
    return pytest.importorskip(
        "tensorrt_lean_bindings", reason="no lean runtime of TensorRT: pip install 'chai-export[dev]'"
    )


def has_name(binary: bytes, name: str) -> bool:
    return name.encode() + b"\0" in binary


def test_the_sources_use_tensorrt_through_the_listed_variables() -> None:
    expected = {
        "MemoryPoolType",
        "WORKSPACE",
        "LayerType",
        "PLUGIN_V3",
        "num_layers",
        "Runtime",
        "is_shape_tensor",
    }
    assert expected <= names_read_from(OBJECTS)


def test_every_name_exists_in_the_bindings(bindings: bytes) -> None:
    names = (
        names_read_from(OBJECTS) - {"__version__"} | METHODS | DATA_TYPES | set().union(*OVERRIDDEN.values())
    )
    assert [name for name in sorted(names) if not has_name(bindings, name)] == []


def test_every_overridden_name_is_one_that_the_bindings_call(bindings: bytes) -> None:
    """They look methods up by name: one of another name is never called, nor is the end of a longer one."""
    names = sorted(set().union(*OVERRIDDEN.values()))
    assert [name for name in names if not has_name(bindings, f"\0{name}")] == []
    assert not has_name(bindings, "\0num_errors")


def test_a_name_that_does_not_exist_would_be_noticed(bindings: bytes) -> None:
    assert not has_name(bindings, "execute_async_v9")


def test_every_name_of_the_runtime_exists_in_the_lean_runtime(lean: Any) -> None:
    assert lean.__version__.startswith("11.4.")
    owners = (lean, lean.Runtime, lean.ICudaEngine, lean.IExecutionContext, lean.IPluginRegistry)
    assert [name for name in sorted(METHODS) if not any(hasattr(owner, name) for owner in owners)] == []
    for base in ("ILogger", "IErrorRecorder"):
        # Read as a property, and overridden under another name.
        methods = {"num_errors" if m == "get_num_errors" else m for m in OVERRIDDEN[base]}
        assert [m for m in sorted(methods) if not hasattr(getattr(lean, base), m)] == []
    assert set(lean.DataType.__members__) >= DATA_TYPES


def test_our_classes_override_every_method_of_the_bases() -> None:
    for tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or not node.bases:
                continue
            base = chain(node.bases[0])
            if len(base) == 2 and base[0] == "tensorrt":
                assert OVERRIDDEN[base[1]] <= {f.name for f in node.body if isinstance(f, ast.FunctionDef)}


def test_every_polygraphy_name_and_argument_exists() -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'chai-export[dev]'")
    assert importlib.metadata.version("polygraphy").startswith("0.53")
    backend = importlib.import_module("polygraphy.backend.trt")
    called = 0
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("polygraphy"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Call) and chain(node.func)[:1] == ("polygraphy",):
                target = getattr(backend, chain(node.func)[1])
                # Functional forms forward to the constructor of a loader class.
                accepted = set(inspect.signature(target).parameters)
                keywords = {keyword.arg for keyword in node.keywords}
                if "kwargs" in accepted:
                    accepted |= set(inspect.signature(target.__mro__[1].__init__).parameters)
                assert keywords <= accepted, (chain(node.func), keywords - accepted)
                called += 1
    assert called >= 4
