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

from chai_export.op.cases import CACHES, CASES, TERM_CASES, Case
from tests.helpers.tensorrt_probe import LIBRARY, Probe, build_probe, inputs_of

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
@pytest.mark.parametrize("case", [*CASES, *TERM_CASES], ids=lambda case: case.name)
def test_enqueue_agrees_with_the_reference(
    probe: Probe, compiled: Any, case: Case, dtype: str, in_place: bool
) -> None:
    from chai_export.kernels.case_runner import check_result, to_tensors
    from chai_export.kernels.launch import Result
    from chai_export.kernels.spec import Shape, Spec

    inputs = case.inputs(dtype)
    tensors = {name: tensor for name, tensor in to_tensors(inputs, "cuda").items() if tensor is not None}
    query, value, cache = tensors["query"], tensors["value"], tensors["key_cache"]
    batch, heads, tokens, head_dim = query.shape
    stored = case.attributes
    spec = Spec(
        heads, case.kv_heads, head_dim, value.shape[3], dtype, stored.probe_tokens,
        key_bits=stored.key_bits, value_bits=stored.value_bits, group_size=stored.group,
        softcap=stored.softcap > 0, sinks=case.sinks, slopes=case.slopes,
    )  # fmt: skip
    pages, kept, length = cache.shape[:3]
    shape = Shape(batch, tokens, kept, tensors["page_table"].shape[1] * length, pages, length)
    pools = {
        name: tensors[name] if in_place else torch.empty_like(tensors[name])
        for name in CACHES
        if name in tensors
    }
    output = torch.full(
        (batch, tokens, heads * value.shape[3]), float("nan"), dtype=query.dtype, device="cuda"
    )
    head_map = torch.empty_like(tensors["past_head_map"])
    made = probe.create(
        compiled(spec), spec, scale=stored.scale, online=int(stored.online), window=stored.window,
        softcap=stored.softcap,
    )  # fmt: skip
    attached = probe.attach(made)
    assert attached.value
    workspace = torch.empty(probe.workspace(made, spec, shape), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    assert probe.enqueue(
        attached,
        spec,
        shape,
        [tensors[name].data_ptr() for name in inputs_of(spec, shape)],
        [tensor.data_ptr() for tensor in (output, *pools.values(), head_map)],
        workspace.data_ptr(),
        stream.cuda_stream,
    )
    stream.synchronize()
    result = Result(output, *(pools.get(name) for name in CACHES), head_map)  # type: ignore[arg-type]
    check_result(case, inputs, result, dtype)
    probe.destroy(made, attached)
