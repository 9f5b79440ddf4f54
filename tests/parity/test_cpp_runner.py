"""The C++ runner prints the Python runner's tokens, and find_package finds it from outside the tree."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import chai_export as ce
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, SWITCH, find_library
from tests.helpers.native_build import ROOT, build, needs_tools, run, succeed
from tests.tiny_graph import TinyModel

PROMPTS = [list(range(4, 33)), [5, 9], [7, 8, 20, 21, 6, 30]]
DEMO = ROOT / "engines" / "out" / "demo" / "bundle"

pytestmark = needs_tools


@pytest.fixture(scope="module")
def onnxruntime_library() -> str:
    import onnxruntime

    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this onnxruntime package has no libonnxruntime.so")
    return str(found[0])


@pytest.fixture(scope="module")
def built() -> Path:
    """The runner and its example; their native tests run in test_native_build.py."""
    folder = build("release", targets=("generate_onnxruntime",))
    assert (folder / "plugins" / "runner" / "chai_export-config.cmake").is_file()
    return folder


@pytest.fixture(scope="module", params=["function body", "library"])
def op_library(request: pytest.FixtureRequest) -> str:
    """Path of the op library; empty for the function body."""
    if request.param == "function body":
        return ""
    path = find_library(ONNXRUNTIME_LIBRARY)
    if path is None:
        pytest.skip("libchai_onnxruntime.so was not built")
    return str(path)


@pytest.fixture
def generate(built: Path, op_library: str, onnxruntime_library: str):
    def call(*arguments, **environment):
        op = ["--op-library", op_library] if op_library else ["--function-body"]
        program = built / "plugins" / "runner" / "generate_onnxruntime"
        return run(program, *op, *arguments, **environment, CHAI_ONNXRUNTIME_LIBRARY=onnxruntime_library)

    return call


def tokens(output: str) -> list[list[int]]:
    return [[int(token) for token in line.split()] for line in output.splitlines()]


def as_argument(prompt: list[int]) -> str:
    return ",".join(map(str, prompt))


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"heads": 6, "kv_heads": 3, "kept": (1, 2)},
        {"heads": 6, "kv_heads": 3, "kept": (2, 1, 2), "sources": (0, 1, 0)},
    ],
    ids=["mha", "gqa", "shared"],
)
def test_example_prints_the_python_runners_tokens(tmp_path, generate, op_library, monkeypatch, heads, sizes):
    bundle = TinyModel(positions=400, **sizes).write(tmp_path / "bundle").path
    monkeypatch.setenv(SWITCH, "1" if op_library else "0")
    expected = ce.load(bundle, heads=heads).generate(PROMPTS, 64)
    flags = ["--all-heads"] if heads == "all" else []
    together = generate(*flags, bundle, 64, *map(as_argument, PROMPTS))
    assert together.returncode == 0, together.stderr
    assert tokens(together.stdout) == [text.token_ids for text in expected]
    alone = generate(*flags, bundle, 64, as_argument(PROMPTS[0]))
    assert tokens(alone.stdout) == [expected[0].token_ids]
    assert len(expected[0].token_ids) == 64


def test_example_agrees_with_the_reference(tmp_path, generate):
    model = TinyModel()
    bundle = model.write(tmp_path / "bundle").path
    assert tokens(generate(bundle, 12, "5,9").stdout) == [model.greedy([5, 9], 12)]


@pytest.mark.slow
def test_example_prints_the_python_runners_tokens_for_the_demo(generate):
    if not DEMO.is_dir():
        pytest.skip("the demo bundle was not built: run `make demo`")
    prompt = [0, 17, 4, 256, 9]
    expected = ce.load(DEMO).generate([prompt], 64)[0].token_ids
    assert tokens(generate(DEMO, 64, as_argument(prompt)).stdout) == [expected]


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (("missing", 4, "1"), {}, "missing is not a bundle"),
        (("BUNDLE", 4, "4,99"), {}, "token id 99 is not in the model's vocabulary of 40"),
        (("BUNDLE", 4, ","), {}, "'' is not a number"),
        (("BUNDLE", 0, "4"), {}, "max_new_tokens"),
        (("BUNDLE", 4, as_argument([3] * 97)), {}, "a prompt has 97 tokens and 96 fit"),
        (("--op-library", "missing.so", "BUNDLE", 4, "1"), {}, "missing.so is missing"),
        (("BUNDLE", 4, "1"), {"CHAI_ONNXRUNTIME_LIBRARY": "missing.so"}, "ONNX Runtime does not load"),
    ],
)
def test_mistakes_are_one_line(tmp_path, built, onnxruntime_library, arguments, environment, reason):
    bundle = TinyModel().write(tmp_path / "bundle").path
    words = [bundle if word == "BUNDLE" else word for word in arguments]
    program = built / "plugins" / "runner" / "generate_onnxruntime"
    done = run(program, *words, **{"CHAI_ONNXRUNTIME_LIBRARY": onnxruntime_library} | environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


def test_graph_that_does_not_fit_its_manifest_is_refused(tmp_path, generate):
    bundle = TinyModel().write(tmp_path / "bundle", head_dim=4).path
    done = generate(bundle, 4, "1")
    assert done.returncode == 1
    assert "model.onnx does not fit its manifest: past_key.0 has size 8 in dimension 3, not 4" in done.stderr


def test_graph_with_another_probe_than_its_manifest_is_refused(tmp_path, generate):
    bundle = TinyModel().write(tmp_path / "bundle", probe_tokens=7).path
    done = generate(bundle, 4, "1")
    assert done.returncode == 1
    assert "probe_tokens of node '' is 5 and should be 7" in done.stderr


def test_rotary_factors_that_follow_a_rows_length_are_refused_by_name(tmp_path, generate):
    bundle = TinyModel().write(tmp_path / "bundle", rope={"types": ["longrope"], "switch_lengths": [64]}).path
    done = generate(bundle, 4, "1")
    assert done.returncode == 1
    assert "rotary factors that follow the length of a row" in done.stderr
    assert "run it from Python" in done.stderr


def test_nothing_is_left_in_the_users_home(tmp_path, generate):
    """ONNX Runtime writes an identity and a database of events there, unless it is told not to."""
    bundle = TinyModel().write(tmp_path / "bundle").path
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": str(home), "XDG_CACHE_HOME": None, "XDG_DATA_HOME": None, "XDG_CONFIG_HOME": None}
    done = generate(bundle, 4, "1", **places, ORT_DISABLE_TELEMETRY=None)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


def test_damaged_op_library_is_one_line(tmp_path, built, onnxruntime_library):
    bundle = TinyModel().write(tmp_path / "bundle").path
    damaged = tmp_path / "libchai_onnxruntime.so"
    damaged.write_text("not a library")
    program = built / "plugins" / "runner" / "generate_onnxruntime"
    done = run(
        *(program, "--op-library", damaged, bundle, 4, "1"), CHAI_ONNXRUNTIME_LIBRARY=onnxruntime_library
    )
    assert done.returncode == 1
    assert "does not load in ONNX Runtime" in done.stderr


def test_program_outside_the_tree_finds_the_package(tmp_path, built, onnxruntime_library):
    """The program of docs/cpp.md, as a reader would build it."""
    page = (ROOT / "docs" / "cpp.md").read_text(encoding="utf-8")
    app = tmp_path / "app"
    app.mkdir()
    for language, file in (("cmake", "CMakeLists.txt"), ("cpp", "main.cpp")):
        (code,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        (app / file).write_text(code, encoding="utf-8")
    prefix = tmp_path / "chai"
    succeed("cmake", "--install", built, "--component", "cpp", "--prefix", prefix)
    flags = "-Wall -Wextra -Werror"
    succeed(
        *("cmake", "-S", app, "-B", app / "build"),
        *(f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_FLAGS={flags}"),
    )
    succeed("cmake", "--build", app / "build")

    model = TinyModel()
    bundle = model.write(tmp_path / "bundle").path
    library = find_library(ONNXRUNTIME_LIBRARY)
    beside = next(prefix.rglob("libchai_runtime.so")).parent / "libchai_onnxruntime.so"
    for op_library in (None, library):
        beside.unlink(missing_ok=True)
        if op_library is not None:
            shutil.copy(op_library, beside)
        done = run(
            *(app / "build" / "app", bundle, 12, 5, 9),
            **{"CHAI_ONNXRUNTIME_LIBRARY": onnxruntime_library, SWITCH: "1"},
        )
        assert done.returncode == 0, done.stderr
        assert tokens(done.stdout) == [model.greedy([5, 9], 12)]
        assert ("function body" in done.stderr) == (op_library is None)
