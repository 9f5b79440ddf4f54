"""Every command that writes: what may stand at its target, what is refused, and that nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from chai_export.bundle.engine_record import add_engine
from chai_export.bundle.manifest import EngineRecord
from chai_export.cli.main import main
from chai_export.clustering import calibrate
from chai_export.exporter import stage
from tests.cli.conftest import TINY, Command
from tests.cli.test_bad_input import fails, largest_file
from tests.helpers.folders import snapshot
from tests.helpers.onnx_fixtures import ALL
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

IMPORTED = (calibrate, stage)
"""They have names of what the tests replace, and must have the real ones."""

GRAPH = next(fixture for fixture in ALL if fixture.name.startswith("A-") and fixture.name.endswith("mha"))
QUICK = ("--samples", "2", "--seq-len", "16", "--keep", "5,3")


@dataclass
class Inputs:
    """What the commands read, in one folder."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def graph(self) -> Path:
        return self.folder / "graph" / "model.onnx"

    @property
    def clusters(self) -> Path:
        return self.folder / "clusters.json"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def bundle(self) -> Path:
        """With an engine that is only bytes."""
        return self.folder / "bundle"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    inputs = Inputs(tmp_path_factory.mktemp("made"))
    shutil.copytree(TINY, inputs.model)
    inputs.graph.parent.mkdir()
    for file in GRAPH.path.glob("*.onnx*"):
        shutil.copy(file, inputs.graph.parent / file.name)
    clusters = {
        "format": "chai-clusters/1",
        "kept_heads": [5, 3],
        "error_curves": [[float(8 - k) for k in range(8)]] * 2,
    }
    inputs.clusters.write_text(json.dumps(clusters))
    inputs.text.write_text("the cat sat on the mat and the dog sat on the log " * 40)
    bundle = TinyModel().write(inputs.bundle, tokenizer=letters_tokenizer())
    shutil.copy(inputs.clusters, inputs.bundle / "clusters.json")
    (inputs.bundle / "engines" / "tensorrt").mkdir(parents=True)
    (inputs.bundle / "engines" / "tensorrt" / "engine.plan").write_bytes(b"")
    record = EngineRecord(
        backend="tensorrt", runtime_version="1", model_sha256="0" * 64, max_batch=1, max_seq=1, op_version=2,
        gpu_architecture="sm_90", created_with="test",
    )  # fmt: skip
    add_engine(bundle, record)
    return inputs


@pytest.fixture
def inputs(made: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    return Inputs(Path(shutil.copytree(made.folder, tmp_path / "inputs")))


@dataclass(frozen=True)
class Writer:
    """One command: its arguments, what it reads, and the function that does its work.

    The function is named in the module that calls it: elsewhere a module imported before would not see a
    test's double, and one imported meanwhile would keep it.
    """

    arguments: Callable[[Inputs, str], tuple[object, ...]]
    sources: Callable[[Inputs], list[Path]]
    work: str


DIRECTORIES = {
    "export": Writer(
        lambda i, out: ("export", i.model, "--clusters", i.clusters, "-o", out),
        lambda i: [i.model, i.clusters],
        "chai_export.exporter.stage.load_model",
    ),
    "rewrite": Writer(
        lambda i, out: ("rewrite", i.graph, "--clusters", i.clusters, "--tokenizer", i.model, "-o", out),
        lambda i: [i.graph.parent, i.clusters, i.model],
        "chai_export.graph.pipeline.rewrite_model",
    ),
    "package": Writer(
        lambda i, out: ("package", i.bundle, "--triton-server", out),
        lambda i: [i.bundle],
        "chai_export.serve.triton_server.repository.model_config",
    ),
}  # fmt: skip
FILES = {
    "calibrate": Writer(
        lambda i, out: ("calibrate", i.model, "--text", i.text, *QUICK, "-o", out),
        lambda i: [i.text, i.model / "config.json"],
        "chai_export.clustering.calibrate.load_model",
    ),
    "plot": Writer(
        lambda i, out: ("calibrate", i.model, "--text", i.text, *QUICK, "-o", i.folder / "c", "--plot", out),
        lambda i: [i.text],
        "chai_export.clustering.calibrate.load_model",
    ),
    "report": Writer(
        lambda i, out: ("report", i.bundle, "-o", out),
        lambda i: [i.bundle / "clusters.json"],
        "chai_export.runtime.runner.load",
    ),
}  # fmt: skip
ENDINGS = {"calibrate": ".json", "plot": ".png", "report": ".html"}


def foreign_directory(target: Path) -> str:
    (target / "src").mkdir(parents=True)
    (target / "manifest.json").write_text('{"name": "a web app", "manifest_version": 3}')
    (target / "src" / "main.ts").write_text("years of work")
    return "it holds manifest.json, src/"


def ours_and_more(target: Path) -> str:
    TinyModel().write(target)
    (target / "chai-repository.json").write_text('{"format": "chai-triton-repository/1", "files": []}')
    (target / "notes.txt").write_text("mine")
    return "notes.txt"


def a_file(target: Path) -> str:
    target.write_text("mine")
    return "is a file; choose an output directory"


def a_pipe(target: Path) -> str:
    os.mkfifo(target)
    return "is a file; choose an output directory"


STANDING = [foreign_directory, ours_and_more, a_file, a_pipe]


@pytest.fixture(params=["by its name", "by a link"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Path]:
    """How the target is named."""

    def named(target: Path) -> Path:
        if request.param == "by its name":
            return target
        link = tmp_path / f"link{target.suffix}"
        link.symlink_to(target)
        return link

    return named


@dataclass
class Refusing:
    """Runs commands that must stop before they begin to work."""

    command: Command
    monkeypatch: pytest.MonkeyPatch
    folder: Path

    def __call__(self, writer: Writer, inputs: Inputs, target: Path, *words: str, code: int = 1) -> None:
        self.monkeypatch.setattr(writer.work, lambda *_, **__: pytest.fail("the work began"))
        before = snapshot(self.folder)
        outcome = self.command(*writer.arguments(inputs, os.fspath(target)))
        outcome.err = outcome.err.removeprefix("calibrate …\n")  # the stage that `make` was about to begin
        assert fails(outcome, *words, code=code)
        assert snapshot(self.folder) == before


@pytest.fixture
def refuses(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refusing:
    return Refusing(command, monkeypatch, tmp_path)


@pytest.mark.parametrize("standing", STANDING)
@pytest.mark.parametrize("writer", DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_directory_takes_the_place_of_nothing_else(writer, standing, inputs, refuses, tmp_path, name):
    word = standing(tmp_path / "target")
    refuses(writer, inputs, name(tmp_path / "target"), f"{tmp_path / 'target'} ", word)


@pytest.mark.parametrize("writer", DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_directory_takes_the_place_of_no_source(writer, inputs, refuses, name, tmp_path):
    for source in writer.sources(inputs):
        if source.is_dir():
            refuses(writer, inputs, source, f"{source} ", "which is read for this output")
    refuses(writer, inputs, name(inputs.folder), f"{inputs.folder} contains", "which is read for this output")
    refuses(writer, inputs, tmp_path, f"{tmp_path} contains {inputs.folder}")


@pytest.mark.parametrize("writer", [DIRECTORIES["export"], DIRECTORIES["rewrite"]], ids=["export", "rewrite"])
def test_a_bundle_that_is_read_for_a_new_one_is_not_replaced_by_it(writer, inputs, refuses):
    """Clusters of the bundle itself, or a model that is a link into it."""
    inputs.clusters.unlink()
    inputs.clusters.symlink_to(inputs.bundle / "clusters.json")
    refuses(writer, inputs, inputs.bundle, f"{inputs.bundle} contains {inputs.clusters}, which is read")


def test_external_data_of_an_onnx_file_is_a_source(inputs, refuses):
    graph, data = inputs.folder / "decoder.onnx", inputs.bundle / "model.onnx.data"
    location = data.relative_to(inputs.folder).as_posix()
    onnx.save(onnx.load(inputs.graph), graph, save_as_external_data=True, location=location, size_threshold=0)
    writer = Writer(
        lambda i, out: ("rewrite", graph, "--clusters", i.clusters, "-o", out),
        lambda i: [],
        DIRECTORIES["rewrite"].work,
    )
    refuses(writer, inputs, inputs.bundle, f"{inputs.bundle} contains {data}, which is read for this output")


@pytest.mark.parametrize("writer", DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_directory_takes_not_the_place_of_the_working_directory(
    writer, inputs, refuses, tmp_path, monkeypatch
):
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    refuses(writer, inputs, Path("."), f"{here} is the working directory")
    refuses(writer, inputs, Path(".."), f"{tmp_path / 'work'} contains the working directory")
    (tmp_path / "link").symlink_to(here)
    refuses(writer, inputs, tmp_path / "link", "is the working directory")


@pytest.mark.parametrize("writer", [*DIRECTORIES.values(), *FILES.values()], ids=[*DIRECTORIES, *FILES])
def test_a_name_that_cannot_be_is_named_and_no_other(writer, inputs, refuses, tmp_path):
    for long in ("n" * 252 + ".png", "ü" * 127 + ".png"):
        refuses(writer, inputs, tmp_path / long, f"{long} cannot be written (File name too long)")
    (tmp_path / "a").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a")
    refuses(writer, inputs, tmp_path / "b.png", "symbolic link in a circle")
    refuses(writer, inputs, inputs.text / "x.png", f"{inputs.text} is no directory")


@pytest.mark.parametrize("writer", DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_directory_whose_name_is_not_utf_8_is_refused(writer, inputs, refuses, tmp_path):
    refuses(writer, inputs, tmp_path / os.fsdecode(b"b\xff"), "is not valid UTF-8")


@pytest.mark.parametrize("writer", FILES.values(), ids=FILES)
def test_a_file_takes_the_place_of_its_kind_only(writer, inputs, refuses, tmp_path, name):
    target = tmp_path / "target.png"
    target.write_text("mine")
    refuses(writer, inputs, name(target), f"{target} exists and is not")


@pytest.mark.parametrize("writer", FILES.values(), ids=FILES)
def test_a_file_takes_the_place_of_no_source_directory_or_device(writer, inputs, refuses, tmp_path):
    for source in writer.sources(inputs):
        link = tmp_path / f"{source.name}.png"
        link.symlink_to(source)
        refuses(writer, inputs, link, f"{source} ")
    (tmp_path / "folder.png").mkdir()
    refuses(writer, inputs, tmp_path / "folder.png", "is a directory; choose an output file")
    os.mkfifo(tmp_path / "pipe.png")
    refuses(writer, inputs, tmp_path / "pipe.png", "is no regular file")
    (tmp_path / "null.png").symlink_to("/dev/null")
    refuses(writer, inputs, tmp_path / "null.png", "/dev/null is no regular file")


def test_the_state_of_a_calibration_takes_the_place_of_nothing_else(inputs, refuses, tmp_path):
    (tmp_path / "c.json.state").write_text("mine")
    refuses(FILES["calibrate"], inputs, tmp_path / "c.json", "c.json.state exists and is not the state")


def test_clusters_and_their_picture_need_two_names(inputs, refuses):
    refuses(FILES["plot"], inputs, inputs.folder / "c", "choose a name that ends in .png", code=2)
    same = Writer(
        lambda i, target: ("calibrate", i.model, "--text", i.text, *QUICK, "-o", target, "--plot", target),
        lambda i: [],
        FILES["plot"].work,
    )
    refuses(same, inputs, inputs.folder / "c.png", "c.png is named for two outputs")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be made, not even by root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("writer", [*DIRECTORIES.values(), *FILES.values()], ids=[*DIRECTORIES, *FILES])
def test_a_folder_that_cannot_be_written_is_named(writer, inputs, refuses, read_only):
    refuses(
        writer, inputs, read_only / "x.png", f"{read_only / 'x.png'} cannot be written", f"in {read_only}"
    )
    refuses(writer, inputs, read_only / "deep" / "x.png", f"{read_only / 'deep' / 'x.png'} cannot be written")


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("writer", ["rewrite", "package", "calibrate", "plot", "report"])
def test_a_full_disk_leaves_what_was_there(writer, earlier, inputs, capsys, tmp_path):
    target = tmp_path / ("target" + ENDINGS.get(writer, ""))
    arguments = [str(word) for word in {**DIRECTORIES, **FILES}[writer].arguments(inputs, str(target))]
    if earlier:
        assert main(arguments) == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    with largest_file(0):
        code = main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1
    assert line.startswith("error: no space left to write ")
    assert snapshot(tmp_path) == before


NAMES = {
    "a new folder": "deep/deeper/x",
    "255 letters": "n" * 251,
    "254 bytes": "ü" * 125,
    "spaces and patterns": "[a] *?'\"$x",
    "hidden": ".x",
}
NOT_UTF_8 = {"not UTF-8": os.fsdecode(b"\xff\xfe"), "251 bytes not UTF-8": os.fsdecode(b"\xff" * 251)}


@pytest.mark.parametrize(
    ("writer", "name"),
    [
        *(pytest.param(w, n, id=f"{w}, {i}") for w in ("package", "report") for i, n in NAMES.items()),
        *(pytest.param("report", n, id=f"report, {i}") for i, n in NOT_UTF_8.items()),
        *(pytest.param("plot", n, id=f"plot, {i}") for i, n in [*NAMES.items(), *NOT_UTF_8.items()][::3]),
        *(
            pytest.param("calibrate", n, id=f"calibrate, {i}")
            for i, n in [*NAMES.items(), *NOT_UTF_8.items()][1::2]
        ),
        pytest.param("rewrite", NAMES["255 letters"], id="rewrite, 255 letters"),
    ],
)
def test_every_other_target_works_and_is_replaced_by_its_own_kind(writer, name, inputs, command, tmp_path):
    target = tmp_path / "out" / (name + {"plot": ".png"}.get(writer, "")) if name else None
    arguments = {**DIRECTORIES, **FILES}[writer].arguments(inputs, os.fspath(target))
    before = snapshot(inputs.folder)
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err
    first = snapshot(tmp_path / "out")
    link = tmp_path / "link.png"
    link.symlink_to(target)
    again = {**DIRECTORIES, **FILES}[writer].arguments(inputs, os.fspath(link))
    assert command(*again).code == 0
    assert link.is_symlink()
    assert snapshot(tmp_path / "out").keys() == first.keys()
    made = snapshot(inputs.folder)
    made.pop("c", None)
    assert made == before


@pytest.mark.parametrize("writer", ["package", "rewrite"])
def test_a_target_inside_a_source_leaves_the_source_as_it_was(writer, inputs, command):
    source = DIRECTORIES[writer].sources(inputs)[0]
    before = snapshot(source)
    for _ in range(2):
        assert command(*DIRECTORIES[writer].arguments(inputs, str(source / "out"))).code == 0
    assert {
        name: content for name, content in snapshot(source).items() if name.split("/")[0] != "out"
    } == before


def test_an_engine_is_built_in_the_working_directory_too(inputs, command, monkeypatch):
    monkeypatch.chdir(inputs.bundle)
    before = snapshot(inputs.bundle)
    assert command("build", ".", "--backend", "onnxruntime", "--max-seq", 16, "--max-batch", 1).code == 0
    after = snapshot(inputs.bundle)
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json"}


def test_building_in_a_bundle_that_cannot_be_written_says_so(inputs, command, read_only):
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    subprocess.run(["mount", "-o", "remount,rw", read_only], check=True)
    bundle = Path(shutil.copytree(inputs.bundle, read_only / "bundle"))
    subprocess.run(["mount", "-o", "remount,ro", read_only], check=True)
    outcome = command("build", bundle, "--backend", "onnxruntime", "--max-seq", 16, "--max-batch", 1)
    assert fails(outcome, f"{bundle / 'manifest.json'} cannot be written (Read-only file system in {bundle})")


def recipe(inputs: Inputs, output: Path | str) -> Path:
    path = inputs.folder / "recipe.yaml"
    settings = {"samples": 2, "seq_len": 16, "keep": "5,3", "text": [str(inputs.text)]}
    path.write_text(json.dumps({"model": str(inputs.model), "output": str(output), "calibrate": settings}))
    return path


MAKE = Writer(
    lambda i, out: ("make", recipe(i, out)), lambda i: [], "chai_export.clustering.calibrate.load_model"
)  # fmt: skip


def made_before(target: Path) -> Path:
    target.mkdir()
    (target / "stages.json").write_text('{"format": "chai-make/1", "stages": {}}')
    return target


@pytest.mark.parametrize("standing", STANDING)
def test_make_goes_into_no_directory_of_somebody_else(standing, inputs, refuses, tmp_path, name):
    standing(tmp_path / "target")
    named = name(tmp_path / "target")
    recipe(inputs, named)
    word = "was not made by" if (tmp_path / "target").is_dir() else "Not a directory"
    refuses(MAKE, inputs, named, f"{named} ", word, "change `output` in the recipe")


def test_make_goes_not_into_the_folder_of_its_recipe(inputs, refuses):
    recipe(inputs, ".")
    refuses(
        MAKE, inputs, Path("."), "was not made by `chai-export make` and holds bundle, clusters.json, graph"
    )


@pytest.mark.parametrize(
    ("name", "standing"),
    [("bundle", foreign_directory), ("bundle", ours_and_more), ("bundle", a_file), ("clusters.json", a_file),
     ("clusters.json", a_pipe), ("error_curves.png", a_file), ("clusters.json.state", a_file)],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_make_replaces_nothing_of_somebody_else_in_its_own_directory(
    name, standing, inputs, refuses, tmp_path
):
    target = made_before(tmp_path / "target")
    standing(target / name)
    recipe(inputs, target)
    refuses(MAKE, inputs, target, f"{target / name} ")


def test_make_replaces_no_bundle_that_it_reads(inputs, refuses, tmp_path):
    target = made_before(tmp_path / "target")
    shutil.move(inputs.bundle, target / "bundle")
    shutil.move(inputs.text, target / "bundle" / "model.onnx")
    inputs.text.symlink_to(target / "bundle" / "model.onnx")
    recipe(inputs, target)
    refuses(MAKE, inputs, target, f"{target / 'bundle'} contains {inputs.text}, which is read")


def test_make_that_fails_before_its_first_stage_leaves_no_directory(inputs, command, tmp_path):
    (inputs.model / "config.json").unlink()
    outcome = command("make", recipe(inputs, tmp_path / "deep" / "target"))
    assert outcome.code == 1
    assert "config.json" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "deep").exists()
