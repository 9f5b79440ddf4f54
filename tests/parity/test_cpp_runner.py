"""The C++ runner prints the Python runner's tokens, and find_package finds it from outside the tree."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import chai_export as ce
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, SWITCH, find_library
from chai_export.runtime.pages import PAGE_LENGTH
from tests.helpers.native_build import ROOT, build, needs_tools, run, succeed
from tests.helpers.tiny_graph import TinyModel

PROMPTS = [list(range(4, 33)), [5, 9], [7, 8, 20, 21, 6, 30]]
SHARED = {"heads": 6, "kv_heads": 3, "kept": (2, 1, 2), "sources": (0, 1, 0)}
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
def implementation(request: pytest.FixtureRequest) -> str:
    """Of the op; the library where it was built."""
    if request.param == "library" and find_library(ONNXRUNTIME_LIBRARY) is None:
        pytest.skip("libchai_onnxruntime.so was not built")
    return request.param


@pytest.fixture
def generate(built: Path, implementation: str, onnxruntime_library: str):
    """The example, with the implementation of the op."""

    def call(*arguments, **environment):
        op = (
            ["--op-library", find_library(ONNXRUNTIME_LIBRARY)]
            if implementation == "library"
            else ["--function-body"]
        )
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
        SHARED,
        {"bits": (8, 4)},
        {**SHARED, "bits": ((4, 8), (16, 4), (0, 0))},
        {"windows": (0, 9)},
        {"windows": (150, 7), "bits": (8, 4)},
        {**SHARED, "windows": (11, 0, 11)},
    ],
    ids=["mha", "gqa", "shared", "8/4", "shared 4/8", "window", "windows", "window shared"],
)
def test_example_prints_the_python_runners_tokens(
    tmp_path, generate, implementation, monkeypatch, heads, sizes
):
    bundle = TinyModel(positions=400, **sizes).write(tmp_path / "bundle")
    monkeypatch.setenv(SWITCH, "1" if implementation == "library" else "0")
    expected = ce.load(bundle.path, heads=heads).generate(PROMPTS, 64)
    flags = ["--all-heads"] if heads == "all" else []
    together = generate(*flags, bundle.path, 64, *map(as_argument, PROMPTS))
    assert together.returncode == 0, together.stderr
    assert tokens(together.stdout) == [text.token_ids for text in expected]
    alone = generate(*flags, bundle.path, 64, as_argument(PROMPTS[0]))
    assert tokens(alone.stdout) == [expected[0].token_ids]
    assert len(expected[0].token_ids) == 64


def test_example_agrees_with_the_reference(tmp_path, generate):
    model = TinyModel()
    bundle = model.write(tmp_path / "bundle").path
    assert tokens(generate(bundle, 12, "5,9").stdout) == [model.greedy([5, 9], 12)]


def test_prompts_wait_for_pages_and_one_that_never_fits_names_the_option(tmp_path, generate, implementation):
    bundle = TinyModel(positions=400, bits=(8, 4)).write(tmp_path / "bundle")
    pages = 2 if implementation == "library" else 4  # of two sets of buffers
    memory = pages * PAGE_LENGTH * bundle.manifest.kv_bytes_per_token()
    rest = (bundle.path, 150, *map(as_argument, [*PROMPTS, list(range(4, 40))]))  # two pages each
    few = generate("--cache-memory", memory, *rest)
    assert few.returncode == 0, few.stderr
    assert tokens(few.stdout) == tokens(generate(*rest).stdout)
    one = generate("--cache-memory", memory, bundle.path, 4, as_argument([3] * 257))
    assert one.returncode == 1
    assert "a prompt has 257 tokens and 256 fit; shorten it or raise cache_memory (" in one.stderr


def test_the_memory_that_the_engine_was_built_for_bounds_the_pool(tmp_path, generate):
    bundle = TinyModel(positions=400).write(tmp_path / "bundle")
    two_pages = 2 * PAGE_LENGTH * bundle.manifest.kv_bytes_per_token()
    ce.build(bundle.path, max_seq=128, cache_memory=two_pages)
    record = bundle.path / "manifest.json"
    content = json.loads(record.read_text())
    content["engines"]["onnxruntime"]["max_seq"] = 300
    record.write_text(json.dumps(content))
    few = generate(bundle.path, 4, as_argument([3] * 257))
    assert few.returncode == 1
    assert "fit; shorten it or raise cache_memory (" in few.stderr


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
        (
            ("--cache-memory", 1, "BUNDLE", 4, "1"),
            {},
            "1 tokens and 0 fit; shorten it or raise cache_memory (1 B)",
        ),
        (("--cache-memory", "2GB", "BUNDLE", 4, "1"), {}, "'2GB' is not a number"),
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


@pytest.mark.parametrize(
    ("bits", "changes", "reason"),
    [
        ((0, 0), {"head_dim": 4}, "past_key.0 has size 8 in dimension 3, not 4"),
        ((8, 4), {"key_bits": [8, 4]}, "past_key.1 has another type"),
        ((8, 4), {"group": 2}, "past_key_scales.0 has size 2 in dimension 3, not 4"),
        ((0, 0), {"key_bits": [8, 8]}, "past_key.0 has another type"),
        (
            (0, 0),
            {"num_layers": 1, "kept_heads": [2], "key_bits": [0], "value_bits": [0]},
            "head_map has size",
        ),
    ],
)
def test_graph_that_does_not_fit_its_manifest_is_refused(
    tmp_path, built, onnxruntime_library, bits, changes, reason
):
    bundle = TinyModel(bits=bits).write(tmp_path / "bundle", **changes).path
    program = built / "plugins" / "runner" / "generate_onnxruntime"
    done = run(program, "--function-body", bundle, 4, "1", CHAI_ONNXRUNTIME_LIBRARY=onnxruntime_library)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"model.onnx does not fit its manifest: {reason}" in done.stderr


def test_graph_with_another_probe_than_its_manifest_is_refused(tmp_path, generate):
    bundle = TinyModel(bits=(8, 4)).write(tmp_path / "bundle", probe_tokens=7).path
    done = generate(bundle, 4, "1")
    assert done.returncode == 1
    assert "probe_tokens of node '' is 5 and should be 7" in done.stderr


def test_rotary_factors_that_follow_a_rows_length_are_refused_by_name(tmp_path, generate):
    rope = {"types": ["longrope"], "switch_lengths": [64]}
    bundle = TinyModel().write(tmp_path / "bundle", rope=rope).path
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

    installed = next(prefix.rglob("libchai_runtime.so")).parent
    beside = installed / f"lib{ONNXRUNTIME_LIBRARY}.so"
    for index, bits in enumerate([(0, 0), (8, 4)]):
        model = TinyModel(bits=bits)
        bundle = model.write(tmp_path / f"bundle {index}").path
        for op_library in (None, find_library(ONNXRUNTIME_LIBRARY)):
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
