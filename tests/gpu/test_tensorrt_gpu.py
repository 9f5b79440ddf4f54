"""The plugin's enqueue on a GPU, without an engine: attached, fed device tensors, compared with float64.

The lean runtime is enough for this. Building and running whole engines needs all of TensorRT.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chai_export.op.cases import CASES, Case
from tests.helpers.tensorrt_probe import LIBRARY, Probe, build_probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not LIBRARY.is_file(), reason="libchai_tensorrt.so was not built: set TensorRT_ROOT"),
]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    trt: Any = pytest.importorskip("tensorrt_lean_bindings", reason="no lean runtime of TensorRT")
    library = build_probe(tmp_path_factory.mktemp("probe"))
    if library is None:
        pytest.skip("compiling the probe needs g++, CUDA's headers and TensorRT_ROOT (TensorRT's headers)")
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(LIBRARY))
    yield Probe(library)
    registry.deregister_library(handle)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels by spec, compiled once."""
    ahead_of_time = importlib.import_module("chai_export.kernels.ahead_of_time")
    major, minor = torch.cuda.get_device_capability()
    known: dict[Any, Path] = {}

    def get(spec: Any) -> Path:
        if spec not in known:
            directory = tmp_path_factory.mktemp("kernels")
            known[spec] = ahead_of_time.compile(spec, 10 * major + minor, directory).parent
        return known[spec]

    return get


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_enqueue_agrees_with_the_reference(
    probe: Probe, compiled: Any, case: Case, dtype: str, in_place: bool
) -> None:
    from chai_export.kernels.case_runner import case_inputs, check_result, to_tensors
    from chai_export.kernels.launch import Result
    from chai_export.kernels.spec import Shape, Spec

    inputs = case_inputs(case, dtype)
    tensors = to_tensors(inputs, dtype, "cuda")
    query, value = tensors["query"], tensors["value"]
    batch, heads, tokens, head_dim = query.shape
    spec = Spec(heads, case.kv_heads, head_dim, value.shape[3], dtype, case.probe_tokens)
    shape = Shape(batch, tokens, case.kept, case.capacity)
    result = Result(
        torch.full((batch, tokens, heads * value.shape[3]), float("nan"), dtype=query.dtype, device="cuda"),
        tensors["past_key"] if in_place else torch.empty_like(tensors["past_key"]),
        tensors["past_value"] if in_place else torch.empty_like(tensors["past_value"]),
        torch.empty_like(tensors["past_head_map"]),
    )
    made = probe.create(
        compiled(spec), scale=case.scale, online=int(case.online), probe_tokens=case.probe_tokens
    )
    attached = probe.attach(made)
    assert attached.value
    workspace = torch.empty(probe.workspace(made, spec, shape), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    names = ("query", "key", "value", "past_key", "past_value", "past_head_map", "past_lengths", "lengths")
    assert probe.enqueue(
        attached,
        spec,
        shape,
        [tensors[name].data_ptr() for name in names],
        [tensor.data_ptr() for tensor in result],
        workspace.data_ptr(),
        stream.cuda_stream,
    )
    stream.synchronize()
    check_result(case, inputs, result, dtype)
    probe.destroy(made, attached)
