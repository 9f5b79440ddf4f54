"""`make gpu` without a GPU: its scripts as they are, on players of TensorRT, CUDA and their provider."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import engine_contact, first_contact
from benchmarks.engine_contact import contact, require
from benchmarks.first_contact import JSON_FILE, TEXT_FILE, Step
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend
from chai_export.engines import onnxruntime as onnxruntime_engine
from chai_export.errors import ChaiError
from chai_export.runtime import onnxruntime_gpu
from chai_export.runtime.onnxruntime_gpu import CudaGpu
from chai_export.runtime.onnxruntime_gpu_session import OnnxRuntimeGpuSession
from tests.helpers.fake_tensorrt import FakeEngine
from tests.helpers.host_gpu import HostGpu
from tests.helpers.played_tensorrt import make_played, write_kernels
from tests.helpers.tiny_graph import TinyModel

MODEL = TinyModel(positions=300, bits=(8, 4))
PROMPTS = [[5, 9], [7, 8, 20, 21, 6, 30], list(range(4, 33)), [11] * 9]
NEW = 130
"""A second page for every row."""
LAYERS = ["[PLUGIN] attention 0", "Reformatting past_key.0", {"Name": "copy of present_value.1"}, "matmul"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return MODEL.write(tmp_path / "bundle")


class Engine(FakeEngine):
    """With an inspector; wrong logits from a number of calls on."""

    def __init__(self, bundle: Bundle, wrong_from: int | None = None) -> None:
        super().__init__(bundle, engine_contact.ROWS, max(map(len, PROMPTS)) + NEW)
        if wrong_from is None:
            return
        real, inputs, outputs = self.session.run, self.session.get_inputs(), self.session.get_outputs()

        def run(names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            made = real(names, feeds)
            if len(self.calls) >= wrong_from:
                made[names.index("logits")] = -made[names.index("logits")]
            return list(made)

        self.session = SimpleNamespace(run=run, get_inputs=lambda: inputs, get_outputs=lambda: outputs)

    def create_engine_inspector(self) -> Any:
        text = json.dumps({"Layers": LAYERS})
        return SimpleNamespace(get_engine_information=lambda kind: text)


@pytest.fixture
def engines(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Those that TensorRT will give, one after the other, then right ones."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'chai-export[dev]'")
    library = tmp_path / "libchai_tensorrt.so"
    library.write_bytes(b"a library")
    played = make_played(bundle, library, monkeypatch, tmp_path)
    given: list[Engine] = []
    played.tensorrt.LayerInformationFormat = SimpleNamespace(JSON="json")
    played.tensorrt.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda plan: given.pop(0) if given else Engine(bundle)
    )
    monkeypatch.setattr("chai_export.runtime.tensorrt_environment.import_tensorrt", lambda: played.tensorrt)
    return given


def test_an_engine_is_built_and_followed_over_its_pages(bundle, engines):
    found = contact(bundle.path, Backend.TENSORRT, PROMPTS, NEW)
    for heads in ("chai heads", "all heads"):
        assert found[heads]["tokens"] == found[heads]["same_tokens"] == NEW * len(PROMPTS)
        assert found[heads]["most_pages"] > engine_contact.ROWS
    assert found["layers_at_caches"] == ["Reformatting past_key.0", "copy of present_value.1"]
    assert found["gpu"] == "sm_90"


def test_an_engine_that_goes_wrong_later_is_found_at_the_token(bundle, engines):
    engines += [Engine(bundle), Engine(bundle, wrong_from=60)]
    with pytest.raises(AssertionError, match=r"token \d+ is \d+ and ONNX Runtime's \d+ is likelier by"):
        contact(bundle.path, Backend.TENSORRT, PROMPTS, NEW)


def test_the_cuda_provider_is_followed_alike(bundle, monkeypatch):
    gpu = CudaGpu(SimpleNamespace(), 90)
    monkeypatch.setattr(onnxruntime_engine, "compile_kernels", write_kernels)
    for module in (onnxruntime_gpu, onnxruntime_engine):
        monkeypatch.setattr(module, "require_cuda_gpu", lambda: gpu)
        monkeypatch.setattr(module, "require_provider", lambda: None)
    host = HostGpu()
    monkeypatch.setattr(onnxruntime_gpu, "gpu_for", lambda bundle: host)
    monkeypatch.setattr(
        onnxruntime_engine,
        "OnnxRuntimeGpuSession",
        lambda bundle, heads, gpu, **options: OnnxRuntimeGpuSession(bundle, heads, host, **options),
    )
    require(Backend.ONNXRUNTIME)
    found = contact(bundle.path, Backend.ONNXRUNTIME, PROMPTS, NEW)
    assert found["gpu"] == "sm_90"
    assert found["chai heads"]["same_tokens"] == NEW * len(PROMPTS)
    monkeypatch.setattr(onnxruntime_gpu, "gpu_for", lambda bundle: None)
    with pytest.raises(AssertionError, match="it runs on the CPU"):
        contact(bundle.path, Backend.ONNXRUNTIME, PROMPTS, NEW)


def test_what_a_machine_lacks_is_skipped_and_said(monkeypatch, capsys):
    def lacking(backend: Backend) -> None:
        raise ChaiError("there is no GPU; buy one")

    monkeypatch.setattr(engine_contact, "require", lacking)
    monkeypatch.setattr(sys, "argv", ["engine_contact.py", "tensorrt"])
    assert engine_contact.main() == 0
    assert json.loads(capsys.readouterr().out) == {"skipped": "there is no GPU; buy one"}


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


STEPS = (
    Step("good", "says something", python("print('hello'); print('{\"ms\": 3}')"), reports=True),
    Step("bad", "exits", python("print('why it failed'); raise SystemExit(3)")),
    Step("crash", "dies of a signal", python("import os; os.kill(os.getpid(), 11)")),
    Step(
        "hangs", "never ends", python("import time; print('began', flush=True); time.sleep(60)"), minutes=0.05
    ),
    Step("lacks", "lacks something", python('print(\'{"skipped": "no GPU"}\')'), reports=True),
    Step("no tests", "collects nothing", python("print('no tests ran'); raise SystemExit(5)")),
    Step("all skipped", "skips", python("print('ss [100%]'); print('SKIPPED [2] x.py: needs a GPU')")),
    Step("some skipped", "skips one", python("print('.s [100%]'); print('SKIPPED [1] x.py: no bfloat16')")),
    Step("nowhere", "is no program", ("/nowhere/program",)),
)


def test_every_step_is_reported_whatever_becomes_of_the_others(tmp_path, monkeypatch):
    written: list[int] = []
    real = first_contact.write_report
    monkeypatch.setattr(
        first_contact, "write_report", lambda folder, all: (written.append(len(all)), real(folder, all))
    )
    assert first_contact.first_contact(STEPS, tmp_path / "report") == 1
    assert written == list(range(1, len(STEPS) + 1))
    report = json.loads((tmp_path / "report" / JSON_FILE).read_text())
    steps = {step["name"]: step for step in report["steps"]}
    assert {name: step["outcome"] for name, step in steps.items()} == {
        "good": "passed", "bad": "failed", "crash": "failed", "hangs": "failed", "lacks": "skipped",
        "no tests": "skipped", "all skipped": "skipped", "some skipped": "passed", "nowhere": "failed",
    }  # fmt: skip
    assert steps["good"]["facts"] == {"ms": 3}
    assert "why it failed" in steps["bad"]["detail"]
    assert "began" in steps["hangs"]["detail"]
    assert "stopped after 0.05 minutes" in steps["hangs"]["detail"]
    assert steps["lacks"]["detail"] == "no GPU"
    text = (tmp_path / "report" / TEXT_FILE).read_text()
    assert [line.split()[0] for line in text.splitlines()[:9]] == [s["outcome"] for s in report["steps"]]
    assert first_contact.first_contact(STEPS[:1], tmp_path / "report") == 0


def test_the_steps_name_files_that_are_there():
    files = [word for step in first_contact.STEPS for word in step.command if word.endswith(".py")]
    assert len(files) > 5
    assert all((first_contact.ROOT / file).is_file() for file in files)
