"""A real TensorRT parser and builder take all of a bundle but its attentions, by the build's own code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.graph_io import BATCH, OUTPUTS, TOKENS
from chai_export.clustering.clusters import Clusters
from chai_export.engines.plain_network import CAPACITY, plain_network
from chai_export.engines.tensorrt import save
from chai_export.engines.tensorrt_lowering import lower_operators
from chai_export.engines.tensorrt_profiles import Range
from chai_export.graph.stage import rewrite
from tests.helpers.exported import bundle_in, bundle_of
from tests.helpers.families import FAMILIES
from tests.helpers.onnx_fixtures import REWRITTEN, Fixture
from tests.helpers.tensorrt_rtx import MODULE, build_cut, in_worker, write_cut

pytest.importorskip(MODULE, reason="TensorRT-RTX is not installed: pip install 'chai-export[dev]'")

ROOT = Path(__file__).parents[2]
FIXTURES_AT_ONCE = {
    "A-torch-2.13.0-opset18-sdpa-gqa",
    "C-torch-2.13.0-opset23-sdpa-mha",
    "D-torch-2.13.0-opset24-sdpa-gqa",
    "E-torch-2.13.0-static-cache-mha",
    "F-optimum-0.1.0-gqa-qknorm",
    "G-genai-0.18.0-cpu-fp32-gqa-bias",
    "G-genai-0.18.0-cpu-int4-gqa-bias",
    "G-genai-0.18.0-cuda-fp16-gqa",
    "H-genai-0.18.0-dml-fp16-gqa",
    "I-genai-0.18.0-cpu-fp16-mha",
    "J-genai-0.18.0-cuda-fp16-gqa-qknorm-fused",
    "K-handmade-onnx-1.23.2-opset24-tensorscatter-gqa",
}
FAMILIES_AT_ONCE = {("qwen3-gqa", "bfloat16"), ("mixtral-gqa", "float16"), ("gpt_neox", "float16")}
"""An export takes seconds, what is built of it less than one."""
DTYPES = ("float32", "float16", "bfloat16")


def slow_but(at_once: bool) -> Any:
    return () if at_once else pytest.mark.slow


def fixture_bundle(fixture: Fixture, place: Path) -> Bundle:
    return rewrite(fixture.path, Clusters([max(1, fixture.kv_heads // 2)] * fixture.layers), place)


@pytest.mark.parametrize(
    "fixture",
    [
        pytest.param(fixture, id=fixture.name, marks=slow_but(fixture.name in FIXTURES_AT_ONCE))
        for fixture in REWRITTEN
    ],
)
def test_a_graph_of_another_exporter_is_built(fixture: Fixture, tmp_path: Path) -> None:
    bundle = fixture_bundle(fixture, tmp_path / "bundle")
    built = build_cut(bundle)
    if bundle.manifest.switch_lengths:
        assert "rotary factors that follow the length of a row" in built.refused
        return
    assert built.refused == ""
    assert built.layers > 100
    assert built.size > 1_000_000


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=slow_but((family, dtype) in FAMILIES_AT_ONCE))
        for family in FAMILIES
        for dtype in DTYPES
    ],
)
def test_a_family_is_built(family: str, dtype: str, tmp_path: Path) -> None:
    built = build_cut(bundle_in(family, dtype, tmp_path))
    assert built.refused == ""
    # What it takes in pieces, such as a rotary embedding through casts, shows as layers.
    assert 50 < built.layers < 450


@pytest.mark.parametrize("options", [{}, {"weight_type": QuantType.QUInt8}, {"per_channel": True}], ids=str)
def test_what_quantize_dynamic_makes_of_a_graph_is_built(options: dict[str, Any], tmp_path: Path) -> None:
    fixture = next(fixture for fixture in REWRITTEN if fixture.name in FIXTURES_AT_ONCE)
    quantize_dynamic(fixture.path / "model.onnx", tmp_path / "model.onnx", **options)
    clusters = Clusters([fixture.kv_heads] * fixture.layers)
    assert build_cut(rewrite(tmp_path / "model.onnx", clusters, tmp_path / "bundle")).refused == ""


def one_node(
    place: Path,
    op_type: str,
    inputs: dict[str, Sequence[Any]],
    constants: dict[str, Any],
    dtype: type = np.float32,
    domain: str = "com.microsoft",
    **attributes: Any,
) -> Path:
    """A graph of one node; the inputs by name with sizes, of ``dtype`` but for positions."""
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64 if n == "positions" else element, sizes)
        for n, sizes in inputs.items()
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    order = [*inputs, *constants]
    node = onnx.helper.make_node(op_type, order, ["y"], name="a node", domain=domain, **attributes)
    made = onnx.helper.make_tensor_value_info("y", element, None)
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "one", infos, [made], tensors)
    path = place / "one.onnx"
    save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path


def lowered(path: Path) -> Path:
    model = onnx.load(str(path))
    lower_operators(model, path.parent, path.parent / "integers.data", "integers.data")
    save(model, path)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("bits", "depth"), [(4, 64), (4, 80), (8, 64)])
@pytest.mark.parametrize("zeros", [False, True])
def test_integer_weights_of_every_kind_are_built(
    dtype: type, bits: int, depth: int, zeros: bool, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    width, blocks = 48, -(-depth // 32)
    constants = {
        "packed": generator.integers(0, 256, (width, blocks, 4 * bits)).astype(np.uint8),
        "scales": np.ones((width, blocks), dtype),
    }
    if zeros:
        constants["zeros"] = np.full((width, -(-blocks * bits // 8)), 3, np.uint8)
    sizes = {"K": depth, "N": width, "bits": bits, "block_size": 32}
    path = one_node(tmp_path, "MatMulNBits", {"x": ["B", "S", depth]}, constants, dtype, **sizes)
    shape = Range((1, 1, depth), (1, 8, depth), (4, 8, depth))
    assert in_worker(lowered(path), ({"x": shape},)).refused == ""


def test_the_op_in_plain_onnx_is_built_with_a_profile_for_prefill_and_one_for_decode() -> None:
    bundle = bundle_of("llama-gqa")
    model = plain_network(bundle)
    path = bundle.path / "plain.onnx"
    save(model, path)
    least = {BATCH: 1, TOKENS: 1, OUTPUTS: 1, CAPACITY: 1}
    largest = [{BATCH: 4, TOKENS: tokens, OUTPUTS: tokens, CAPACITY: 64} for tokens in (64, 1)]

    def shape(value: onnx.ValueInfoProto, at: dict[str, int]) -> tuple[int, ...]:
        return tuple(at.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim)

    def ranges(most: dict[str, int]) -> dict[str, Range]:
        values = model.graph.input
        return {v.name: Range(shape(v, least), shape(v, most), shape(v, most)) for v in values}

    built = in_worker(path, tuple(map(ranges, largest)))
    assert built.refused == ""
    assert built.layers > 1000


def test_a_graph_that_ends_the_parser_ends_no_test(tmp_path: Path) -> None:
    """What is lowered or refused beforehand: this one divides by num_heads."""
    tables = {name: np.ones((20, 8), np.float32) for name in ("cos", "sin")}
    inputs = {"x": ["B", "S", 64], "positions": ["B", "S"]}
    path = one_node(tmp_path, "RotaryEmbedding", inputs, tables, num_heads=0)
    ids = Range((1, 1), (1, 8), (4, 8))
    shapes = ({"x": Range((1, 1, 64), (1, 8, 64), (4, 8, 64)), "positions": ids},)
    assert in_worker(path, shapes).refused.startswith("the process ended")
    assert in_worker(lowered(path), shapes).refused == ""


def test_a_parser_error_names_the_node_and_the_cause(tmp_path: Path) -> None:
    path = one_node(tmp_path, "Concat", {"x": ["B", 64]}, {"w": np.ones(3, np.float32)}, domain="", axis=7)
    refused = in_worker(path, ({"x": Range((1, 64), (1, 64), (4, 64))},)).refused
    assert refused.startswith("TensorRT's ONNX parser does not take Concat (a node): ")
    assert "7" in refused


def test_a_build_error_names_the_cause(tmp_path: Path) -> None:
    fixture = next(fixture for fixture in REWRITTEN if fixture.name.startswith("C-"))
    path, shapes = write_cut(fixture_bundle(fixture, tmp_path / "bundle"), 4, 64)
    shapes[1]["lengths"] = Range((1, 1), (4, 1), (4, 1))
    refused = in_worker(path, shapes).refused
    assert refused.startswith("TensorRT could not build the engine (")
    assert "lengths has 1 dimensions but profile 1 has 2" in refused


def test_a_run_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    """The worker holds both ends of its queues, so it does not see them close."""
    script = (
        "import os, time\n"
        "from tests.helpers.tensorrt_rtx import _worker\n"
        "print(_worker().submit(os.getpid).result(), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        assert psutil.pid_exists(worker)
        run.kill()
    # Init collects it, or nobody does: then it is a zombie.
    gone, _ = psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], timeout=60)
    assert gone or not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
