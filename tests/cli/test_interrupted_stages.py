"""Signals at random moments of every command that writes: the old or the new output, and nothing else."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.engine_record import add_engine
from chai_export.bundle.manifest import EngineRecord
from chai_export.bundle.work_directory import SUFFIX
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.plot import PICTURE
from chai_export.report.stage import REPORT
from chai_export.serve.triton_server.repository import RECORD_FILE
from tests.cli.conftest import TINY
from tests.helpers.onnx_fixtures import ALL
from tests.helpers.stage_server import StageServer, serving
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRAPH = next(fixture for fixture in ALL if fixture.name.startswith("A-") and fixture.name.endswith("mha"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a graph, a text, a bundle with an engine that is only bytes, and two sets of clusters."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").symlink_to(TINY)
    shutil.copy(next(GRAPH.path.glob("*.onnx")), folder / "graph.onnx")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log " * 40)
    for name, kept in (("old", [5, 3]), ("new", [4, 4])):
        curves = [[float(8 - k) for k in range(8)]] * 2
        content = {"format": "chai-clusters/1", "kept_heads": kept, "error_curves": curves}
        (folder / f"{name}.json").write_text(json.dumps(content))
    bundle = TinyModel().write(folder / "bundle", tokenizer=letters_tokenizer())
    shutil.copy(folder / "old.json", folder / "bundle" / "clusters.json")
    (folder / "bundle" / "engines" / "tensorrt").mkdir(parents=True)
    (folder / "bundle" / "engines" / "tensorrt" / "engine.plan").write_bytes(b"plan")
    record = EngineRecord(
        backend="tensorrt", runtime_version="1", model_sha256="0" * 64, max_batch=1, max_seq=1, op_version=2,
        gpu_architecture="sm_90", created_with="test",
    )  # fmt: skip
    add_engine(bundle, record)
    return folder


@pytest.fixture(scope="module")
def server(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageServer]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, {"XDG_CACHE_HOME": str(folder), "CHAI_EXPORT_NATIVE": "0"}) as server:
        yield server


@dataclass(frozen=True)
class Stage:
    """A command that turns "old" or "new" into an output; ``whole`` says which of them an output is."""

    arguments: Callable[[Path, str, Path], list[object]]
    whole: Callable[[Path], str]
    names: set[str]


def which(kept: object) -> str:
    return {(5, 3): "old", (4, 4): "new"}[tuple(kept)]  # type: ignore[arg-type]


def whole_bundle(folder: Path) -> str:
    return which(Bundle.load(folder / "out").manifest.kept_heads)


def whole_clusters(folder: Path) -> str:
    assert not (folder / "out.png").exists() or PICTURE.is_ours(folder / "out.png")
    return which(Clusters.load(folder / "out").kept_heads)


def whole_page(folder: Path) -> str:
    page = (folder / "out").read_text()
    assert REPORT.is_ours(folder / "out")
    assert page.rstrip().endswith("</html>")
    return "old" if "xold" in page else "new"


def whole_repository(folder: Path) -> str:
    out = folder / "out"
    record = json.loads((out / RECORD_FILE).read_text())
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {*record["files"], RECORD_FILE}
    return "old" if (out / "old").is_dir() else "new"


def whole_engine(folder: Path) -> str:
    bundle = Bundle.load(folder / "out")
    engine = bundle.manifest.engines.get("onnxruntime")
    assert "tensorrt" in bundle.manifest.engines
    return "new" if engine is not None and engine.max_batch == 2 else "old"


def whole_recipe(folder: Path) -> str:
    out = folder / "out"
    if not (out / "stages.json").exists():
        assert not out.exists()
        return "nothing"
    stages = json.loads((out / "stages.json").read_text())["stages"]
    for stage, name in (("calibrate", "clusters.json"), ("export", "bundle")):
        if stage in stages:
            assert (out / name).exists()
    if (out / "bundle").exists():
        Bundle.load(out / "bundle")
    known = {"stages.json", "clusters.json", "clusters.json.state", "error_curves.png", "bundle"}
    assert {path.name for path in out.iterdir()} <= known | {"verify.json", "run.json"}
    return "begun"


def recipe(inputs: Path, mark: str, folder: Path) -> Path:
    kept = {"old": "5,3", "new": "4,4"}[mark]
    calibrate = {"samples": 2, "seq_len": 16, "keep": kept, "text": [str(inputs / "text.txt")]}
    content = {"model": str(inputs / "model"), "output": str(folder / "out"), "calibrate": calibrate}
    path = inputs / "recipe.yaml"
    path.write_text(json.dumps({**content, "run": {"prompts": ["a b"], "max_new_tokens": 2}}))
    return path


def calibrating(inputs: Path, mark: str, folder: Path) -> list[object]:
    kept = {"old": "5,3", "new": "4,4"}[mark]
    settings = ["--samples", 12, "--seq-len", 16, "--keep", kept]
    outputs = ["-o", folder / "out", "--plot", folder / "out.png"]
    return ["calibrate", inputs / "model", "--text", inputs / "text.txt", *settings, *outputs]


def written(inputs: Path, mark: str, folder: Path) -> list[object]:
    return ["--clusters", inputs / f"{mark}.json", "-o", folder / "out"]


STAGES = {
    "calibrate": Stage(calibrating, whole_clusters, {"out", "out.png", "out.state"}),
    "export": Stage(
        lambda i, mark, folder: ["export", i / "model", *written(i, mark, folder)],
        whole_bundle,
        {"out"},
    ),
    "rewrite": Stage(
        lambda i, mark, folder: ["rewrite", i / "graph.onnx", *written(i, mark, folder)],
        whole_bundle,
        {"out"},
    ),
    "build": Stage(
        lambda i, mark, folder: [
            "build", folder / "out", "--backend", "onnxruntime", "--max-seq", 16,
            "--max-batch", {"old": 1, "new": 2}[mark],
        ],
        whole_engine,
        {"out"},
    ),
    "package": Stage(
        lambda i, mark, folder: ["package", i / "bundle", "--triton-server", folder / "out", "--name", mark],
        whole_repository,
        {"out"},
    ),
    "report": Stage(
        lambda i, mark, folder: ["report", i / "bundle", "-o", folder / "out", "--prompt", f"x{mark}"],
        whole_page,
        {"out"},
    ),
    "make": Stage(lambda i, mark, folder: ["make", recipe(i, mark, folder)], whole_recipe, {"out"}),
}  # fmt: skip


class Interrupting:
    """Runs one stage again and again and ends it by signals at random moments."""

    def __init__(
        self, name: str, inputs: Path, folder: Path, server: StageServer, graph: Path | None
    ) -> None:
        self.stage = STAGES[name]
        self.folder = folder
        self._inputs, self._server, self._graph = inputs, server, graph
        self._moments = random.Random(f"moments of {name}")
        if name == "build":
            shutil.copytree(inputs / "bundle", folder / "out")
        self.write("new")
        self._seconds = self.write("old")  # the second is warm

    def write(self, mark: str) -> float:
        """The whole stage; what it took."""
        run = self._server.run(self.stage.arguments(self._inputs, mark, self.folder), graph=self._graph)
        assert run.code == 0, run.err
        return run.seconds

    def interrupt(self, number: int) -> int:
        """Begin to write "new", send a signal, and check the command's last words; its exit code."""
        arguments = self.stage.arguments(self._inputs, "new", self.folder)
        after = self._moments.uniform(0, self._seconds)
        run = self._server.run(arguments, number=number, after=after, graph=self._graph)
        errors = [line for line in run.err.splitlines() if line.startswith("error:")]
        assert run.code in {0, 128 + number, -number}, run.err
        assert len(errors) == (1 if run.code > 0 else 0), run.err
        assert "Traceback" not in run.err
        return run.code

    def found(self) -> str | None:
        """Which output is there, after a look for leftovers."""
        names = {path.name for path in self.folder.iterdir()}
        assert names <= self.stage.names
        assert not list(self.folder.rglob(f"*{SUFFIX}"))
        return self.stage.whole(self.folder) if "out" in names else None

    def clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def interrupt(name: str, stage: Interrupting, signals: list[int]) -> set[int]:
    """Send each signal to a run of its own; the exit codes that were seen."""
    codes = set()
    for count, number in enumerate(signals):
        if count % 2 and name != "build":  # every second one writes to where nothing was
            stage.clear()
        before = stage.found()
        code = stage.interrupt(number)
        if number == signal.SIGKILL and code != 0:
            stage.write("new")  # cleans up after the one that was killed
        after = stage.found()
        assert after in {before, "new", *(["begun", None] if name == "make" else [])}
        assert after == "new" or code != 0 or name == "make"
        if after == "new":
            stage.write("old")
        codes.add(code)
    return codes


FEW = {"calibrate": 4, "export": 2, "rewrite": 3, "build": 3, "package": 3, "report": 4, "make": 2}


@pytest.mark.parametrize("name", STAGES)
def test_a_signal_at_a_random_moment_leaves_the_old_or_the_new_output(name, inputs, tmp_path, server):
    stage = Interrupting(name, inputs, tmp_path, server, inputs / "graph.onnx")
    interrupt(name, stage, [ENDING[count % len(ENDING)] for count in range(FEW[name])])


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_signals_at_fifty_moments_of_each_stage(name, inputs, tmp_path, server):
    kinds = (*ENDING, signal.SIGKILL)
    stage = Interrupting(name, inputs, tmp_path, server, None)
    codes = interrupt(name, stage, [kinds[count % len(kinds)] for count in range(50)])
    assert len(codes) > 2, "the signals came too late"
