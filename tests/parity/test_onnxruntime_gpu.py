"""ONNX Runtime's CUDA provider without a GPU: its session on a GPU that the host plays, what is built for it.

The op for that provider is tested in plugins/tests/op/onnxruntime; no GPU has run either yet.
"""

from __future__ import annotations

import json
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.cli.main import main
from chai_export.engines import onnxruntime as engine_module
from chai_export.engines.build import build
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime import onnxruntime_gpu
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library
from chai_export.runtime.onnxruntime_gpu import KERNELS, PROVIDER, CudaGpu, gpu_for, require_cuda_gpu
from chai_export.runtime.onnxruntime_gpu_session import OnnxRuntimeGpuSession
from chai_export.runtime.runner import Runner
from chai_export.runtime.sampling import SamplingSettings
from chai_export.runtime.session import open_session
from chai_export.serve.job import End, Event
from chai_export.serve.model import open_model
from tests.helpers.host_gpu import HostGpu
from tests.helpers.played_tensorrt import write_kernels
from tests.helpers.played_triton_server import read_config
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

pytestmark = pytest.mark.skipif(
    find_library(ONNXRUNTIME_LIBRARY) is None, reason="libchai_onnxruntime.so was not built"
)
GROUPED: dict[str, Any] = {"heads": 6, "kv_heads": 3, "kept": (1, 2), "head_dim": 4, "value_dim": 8}
MODELS = {
    "mha": TinyModel(positions=400),
    "gqa": TinyModel(positions=400, **GROUPED),
    "8/4": TinyModel(positions=400, bits=(8, 4)),
    "mixed": TinyModel(positions=400, bits=((4, 16), (0, 8)), **GROUPED),
    "switch": TinyModel(positions=400, switch=20),
}
PROMPTS = [[5, 9], [7, 8, 20, 21, 6, 30], list(range(4, 33))]
PAGE = 8


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: model.write(root / name) for name, model in MODELS.items()}


def opened(bundle: Bundle, heads: str = "chai", gpu: HostGpu | None = None, **options: Any) -> Runner:
    session = OnnxRuntimeGpuSession(bundle, heads, gpu or HostGpu(), threads=1, page_length=PAGE, **options)
    return Runner(bundle, session, "onnxruntime", heads, max_batch=3)


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", list(MODELS))
def test_texts_logits_and_maps_are_those_of_the_reference(bundles, name, heads):
    runner = opened(bundles[name], heads)
    for prompt in PROMPTS:
        logits, maps = MODELS[name].reference(prompt, heads)
        np.testing.assert_allclose(runner.logits(prompt), logits, atol=1e-4)
        np.testing.assert_array_equal(runner.head_maps, maps)
    results = runner.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == MODELS[name].greedy(prompt, 20, heads)


def test_pools_are_allocated_when_a_batch_begins_and_rows_wait_for_pages(bundles):
    per_token = bundles["8/4"].manifest.kv_bytes_per_token("chai")
    runner = opened(bundles["8/4"], cache_memory=6 * PAGE * per_token)
    results = runner.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == MODELS["8/4"].greedy(prompt, 12)
    assert runner.session.cache_bytes == 6 * PAGE * per_token
    runner.session.drop()
    assert runner.session.cache_bytes == 0
    with pytest.raises(ChaiError, match=r"shorten it or free GPU memory \(3.9 KiB are free\)"):
        opened(bundles["mha"], gpu=HostGpu(memory=4000)).generate([PROMPTS[2] * 3])


def test_beginnings_are_shared_on_the_device(tmp_path, monkeypatch):
    made = MODELS["8/4"].write(tmp_path / "bundle", tokenizer=letters_tokenizer(), eos=[1])
    gpu = HostGpu()
    monkeypatch.setattr(onnxruntime_gpu, "gpu_for", lambda bundle: gpu)
    real = OnnxRuntimeGpuSession.__init__
    monkeypatch.setattr(
        OnnxRuntimeGpuSession, "__init__", lambda self, *a, **k: real(self, *a, **{**k, "page_length": PAGE})
    )
    model = open_model(made.path, max_rows=2, max_seq=64)
    stem = [5, 9, 7, 8, 20, 21, 6, 30, 31, 10, 11, 12, 5, 6]
    for prompt in (stem, [*stem, 4], [*stem[:13], 22, 23], stem):
        events: Queue[Event] = Queue()
        job = model.job(prompt, events.put, SamplingSettings(), max_new_tokens=9, ignore_eos=True)
        model.engine.submit([job])
        while not isinstance(events.get(timeout=60), End):
            pass
        assert job.request.new_ids == MODELS["8/4"].greedy(prompt, 9)
    assert model.engine.batch.counts.reused_tokens > 0
    assert gpu.copies > 0
    model.close()


def test_a_provider_that_does_not_start_is_no_cpu_session(bundles):
    if PROVIDER in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    gpu = HostGpu()
    gpu.provider = PROVIDER
    with pytest.raises(ChaiError, match=f"could not start its {PROVIDER}"):
        opened(bundles["mha"], gpu=gpu)


def test_the_library_is_asked_for_the_gpu_without_a_driver():
    try:
        assert require_cuda_gpu().free_memory() > 0
    except ChaiError:
        with pytest.raises(ChaiError, match="there is no GPU to compute on"):
            require_cuda_gpu()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are only bytes."""
    monkeypatch.setattr(engine_module, "compile_kernels", write_kernels)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let there be a GPU of an architecture, and a provider for it."""

    def play(architecture: int) -> None:
        monkeypatch.setattr(onnxruntime_gpu.ort, "get_available_providers", lambda: [PROVIDER])
        gpu = CudaGpu(SimpleNamespace(), architecture)
        for module in (onnxruntime_gpu, engine_module):
            monkeypatch.setattr(module, "require_cuda_gpu", lambda: gpu)

    return play


def test_kernels_are_built_without_a_gpu_and_stay_when_limits_change(tmp_path, quick):
    bundle = MODELS["mixed"].write(tmp_path / "bundle")
    record = build(bundle.path, "onnxruntime", max_batch=2, max_seq=64, gpu="sm_90,80")
    assert record.settings == {"gpu_architectures": "sm_80,sm_90"}
    forms = {name.split("/")[-2] for name in record.files}
    assert len(forms) == 2  # layers that store alike share one
    assert {name.removeprefix(f"{KERNELS}/").split("/")[0] for name in record.files} == {"sm_80", "sm_90"}
    again = build(bundle.path, "onnxruntime", max_batch=3, max_seq=64)
    assert (again.files, again.settings) == (record.files, record.settings)
    other = build(bundle.path, "onnxruntime", max_seq=64, gpu="sm_75")
    assert all(name.startswith(f"{KERNELS}/sm_75/") for name in other.files)
    assert sorted(p.name for p in (bundle.path / KERNELS).iterdir()) == ["sm_75"]
    # They belong to the bundle, which may be replaced with them.
    MODELS["mixed"].write(bundle.path)


def test_the_gpu_that_is_here_is_the_default_and_proves_its_kernels(tmp_path, quick, on_gpu, monkeypatch):
    bundle = MODELS["8/4"].write(tmp_path / "bundle")
    on_gpu(89)
    proven: list[Path] = []

    def session(bundle: Bundle, heads: str, gpu: CudaGpu, **options: Any) -> OnnxRuntimeGpuSession:
        proven.append(gpu.kernels)
        assert (gpu.kernels / "sm_89").is_dir()
        return OnnxRuntimeGpuSession(bundle, heads, HostGpu(gpu.kernels), **options)

    monkeypatch.setattr(engine_module, "OnnxRuntimeGpuSession", session)
    assert main(["build", str(bundle.path), "--backend", "onnxruntime", "--max-seq", "64", "--gpu"]) == 0
    assert len(proven) == 2  # CHAI's heads and all
    build(bundle.path, "onnxruntime", max_seq=64, gpu="sm_90")
    assert len(proven) == 2  # nothing here to prove those on


def test_a_bundle_runs_on_the_gpu_it_has_kernels_for(tmp_path, quick, on_gpu, capsys, monkeypatch):
    bundle = MODELS["8/4"].write(tmp_path / "bundle")
    assert gpu_for(bundle) is None  # no provider, or no GPU
    on_gpu(90)
    assert gpu_for(bundle) is None
    assert (
        "has no kernels for the GPU here and runs on the CPU; `chai-export build" in capsys.readouterr().err
    )
    monkeypatch.setattr(engine_module, "_gpu_here", lambda wanted, kernels: None)
    build(bundle.path, "onnxruntime", max_seq=64, gpu="sm_80,sm_90")
    bundle = Bundle.load(bundle.path)
    gpu = gpu_for(bundle)
    assert gpu is not None
    assert gpu.kernels == bundle.path / KERNELS
    host = HostGpu(gpu.kernels)
    monkeypatch.setattr(onnxruntime_gpu, "gpu_for", lambda bundle: host)
    assert isinstance(open_session(bundle, "onnxruntime", "chai"), OnnxRuntimeGpuSession)
    # Whoever wants something that the GPU has not stays on the CPU.
    assert not isinstance(open_session(bundle, "onnxruntime", "chai", native=False), OnnxRuntimeGpuSession)
    monkeypatch.undo()
    on_gpu(75)
    with pytest.raises(
        ChaiError, match=r"kernels for sm_80, sm_90 and this GPU is sm_75; run `chai-export bu"
    ):
        gpu_for(bundle)
    on_gpu(90)
    next((bundle.path / KERNELS).rglob("*.cubin")).write_bytes(b"changed")
    with pytest.raises(ChaiError, match=r"cubin was changed"):
        gpu_for(bundle)


@pytest.mark.parametrize(
    ("gpu", "kind", "message"),
    [
        ("sm_12", UsageError, "--gpu is 'sm_12'; give some of sm_75"),
        ("", UsageError, "--gpu is ''"),
        (
            "here",
            ChaiError,
            r"there is no GPU to compute on .* or name what to compile for, such as --gpu sm_",
        ),
    ],
)
def test_architectures_that_cannot_be_are_refused(tmp_path, quick, gpu, kind, message):
    bundle = MODELS["mha"].write(tmp_path / "bundle")
    try:
        require_cuda_gpu()
    except ChaiError:
        with pytest.raises(kind, match=message):
            build(bundle.path, "onnxruntime", max_seq=64, gpu=gpu)
        assert not (bundle.path / KERNELS).exists()


def test_what_has_no_gpu_kernels_is_refused(tmp_path, quick):
    shared = TinyModel(heads=6, kv_heads=3, kept=(2, 1, 2), sources=(0, 1, 0)).write(tmp_path / "shared")
    with pytest.raises(ChaiError, match=r"has no GPU kernels; leave --gpu out"):
        build(shared.path, "onnxruntime", max_seq=64, gpu="sm_90")
    with pytest.raises(UsageError, match="--gpu is for --backend onnxruntime"):
        build(shared.path, "tensorrt", gpu="sm_90")


def test_a_packaged_bundle_with_kernels_is_for_a_gpu(tmp_path, quick, capsys):
    bundle = MODELS["8/4"].write(tmp_path / "bundle", tokenizer=letters_tokenizer())
    build(bundle.path, "onnxruntime", max_seq=64, gpu="sm_90")
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["package", str(bundle.path), "--triton-server", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "onnxruntime"
    (group,) = read_config(out / "chai" / "config.pbtxt").instance_group
    assert (group.kind, list(group.gpus)) == (1, [0])
    assert (out / "chai" / "1" / "bundle" / KERNELS / "sm_90").is_dir()
