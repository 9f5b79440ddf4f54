"""Only what we wrote is replaced; whatever else stands in the way is named and left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from chai_export.bundle.atomic import atomic_directory, atomic_file
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.manifest import FileRecord
from chai_export.bundle.parts import BUNDLE, ENGINE
from chai_export.bundle.targets import DirectoryKind, FileKind
from chai_export.clustering.clusters import CLUSTERS, Clusters
from chai_export.clustering.plot import PICTURE, plot_curves
from chai_export.errors import ChaiError
from chai_export.serve.triton_server.repository import REPOSITORY
from tests.helpers.folders import snapshot
from tests.helpers.tiny_graph import TinyModel

RECORD = FileRecord(sha256="0" * 64, size=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine; tests copy it."""
    path = tmp_path_factory.mktemp("made") / "bundle"
    TinyModel().write(path, engines={"tensorrt": engine_record()})
    for name in engine_record()["files"]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("")
    return path


def engine_record() -> dict[str, object]:
    names = ("engines/tensorrt/engine.plan", "engines/tensorrt/kernels/probe.cubin", "tensorrt.onnx")
    return {
        "backend": "tensorrt", "runtime_version": "1", "model_sha256": "0" * 64, "max_batch": 1, "max_seq": 1,
        "op_version": 2, "files": dict.fromkeys(names, RECORD), "created_with": "test",
    }  # fmt: skip


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def replace(target: Path, kind: DirectoryKind = BUNDLE, sources: list[object] | None = None) -> None:
    with atomic_directory(target, kind, sources=sources or []) as directory:
        (directory / "new").write_text("")


def refuses(
    target: Path, *words: str, kind: DirectoryKind = BUNDLE, sources: list[object] | None = None
) -> bool:
    """The target is refused before anything is written, in one line with these words, and nothing changes."""
    before = snapshot(target.parent)
    with pytest.raises(ChaiError) as caught, atomic_directory(target, kind, sources=sources or []):
        pytest.fail("the work began")
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    assert snapshot(target.parent) == before
    return True


def replaced(target: Path) -> bool:
    return [path.name for path in target.iterdir()] == ["new"]


def test_a_bundle_is_replaced_engines_and_all(bundle):
    replace(bundle)
    assert replaced(bundle)


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    replace(tmp_path / "out")
    assert replaced(tmp_path / "out")


def test_a_damaged_bundle_is_replaced(bundle):
    (bundle / "model.onnx").write_bytes(b"damaged")
    (bundle / "engines/tensorrt/engine.plan").unlink()
    replace(bundle)
    assert replaced(bundle)


@pytest.mark.parametrize("version", ["chai-bundle/0", "chai-bundle/7"])
def test_a_bundle_of_another_version_is_replaced(tmp_path, version):
    (tmp_path / "out").mkdir()
    manifest = {"format": version, "files": {"model.onnx": {}}, "engines": {"x": {"files": {"e/x": 1}}}}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "out" / "model.onnx").write_text("")
    (tmp_path / "out" / "e").mkdir()
    (tmp_path / "out" / "e" / "x").write_text("")
    replace(tmp_path / "out")
    assert replaced(tmp_path / "out")


def test_what_a_killed_build_leaves_does_not_stand_in_the_way(bundle):
    for name in (
        "engines/tensorrt/kernels/k8v4/other.cubin",
        "engines/tensorrt/kernels/other.cubin",
        "engines/.tensorrt.chai-partial/lock",
        ".tensorrt.onnx",
        ".layers-12.onnx",
        ".manifest.json.chai-partial/new/manifest.json",
    ):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("")
    replace(bundle)
    assert replaced(bundle)


@pytest.mark.parametrize(
    "manifest",
    [
        '{"name": "app", "version": 3}', '{"format": "chai-bundle"}', '{"format": ["chai-bundle/1"]}',
        "[]", "null", "", "not JSON", "[" * 100_000, '{"format": "chai-clusters/1"}', "\udcff",
    ],
    ids=lambda text: text[:20].encode("ascii", "replace").decode() or "empty",
)  # fmt: skip
def test_another_directory_with_a_manifest_is_refused(tmp_path, manifest):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogateescape"))
    (tmp_path / "out" / "index.html").write_text("years of work")
    assert refuses(tmp_path / "out", "out is not a bundle of chai_export", "index.html")


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
def test_a_pipe_or_directory_for_a_manifest_is_refused_at_once(tmp_path, name):
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / name)
    assert refuses(tmp_path / "pipe", "pipe is not a bundle")
    (tmp_path / "folder" / name).mkdir(parents=True)
    assert refuses(tmp_path / "folder", "folder is not a bundle")


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "model.onnx.bak", ".git/config", "engines/tensorrt/notes.txt", "engines/notes.txt",
     "engines/tensorrt/kernels/probe.cu", "a/b/c", "report.html", "manifest.json.old"],
)  # fmt: skip
def test_a_bundle_with_a_file_of_the_user_is_refused(bundle, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("mine")
    assert refuses(bundle, f"bundle holds {name.split('/')[0]}", "which chai_export did not write")


def test_a_bundle_with_many_files_of_the_user_names_some(bundle):
    for number in range(9):
        (bundle / f"n{number}").write_text("")
    assert refuses(bundle, "holds n0, n1, n2 and more, which")


def test_empty_directories_and_links_of_the_user_count_as_well(bundle, tmp_path):
    (bundle / "plans").mkdir()
    assert refuses(bundle, "bundle holds plans/, which")
    (bundle / "plans").rmdir()
    (bundle / "link").symlink_to(tmp_path)
    assert refuses(bundle, "bundle holds link")


def test_a_directory_by_the_name_of_a_file_is_refused_with_what_is_in_it(bundle):
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").mkdir()
    (bundle / "model.onnx" / "thesis.tex").write_text("")
    assert refuses(bundle, "model.onnx/thesis.tex")


def test_a_bundle_in_which_an_engine_is_being_built_is_refused_and_names_the_process(bundle):
    with atomic_directory(bundle / "engines" / "tensorrt", ENGINE) as directory:
        assert refuses(bundle, "engines/.tensorrt.chai-partial", f"process {os.getpid()} is writing")
        (directory / "engine.plan").write_text("")


def test_an_engine_is_replaced_only_by_itself(bundle):
    replace(bundle / "engines" / "tensorrt", ENGINE)
    (bundle / "engines" / "tensorrt" / "notes.txt").write_text("")
    assert refuses(bundle / "engines" / "tensorrt", "notes.txt", kind=ENGINE)


@pytest.mark.parametrize("kind", [BUNDLE, ENGINE, REPOSITORY])
def test_a_foreign_directory_is_refused_by_every_kind(tmp_path, kind):
    (tmp_path / "out").mkdir()
    for name in ("start.sh", "stages.json", "thesis.tex"):
        (tmp_path / "out" / name).write_text("{}")
    assert refuses(
        tmp_path / "out", f"is not {kind.noun}: it holds stages.json, start.sh, thesis.tex,", kind=kind
    )


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (lambda bundle: bundle, "is"),
        (lambda bundle: bundle / "model.onnx", "contains"),
        (lambda bundle: bundle / "engines" / "tensorrt", "contains"),
        (lambda bundle: bundle.parent / "into", "is"),
        (lambda bundle: bundle.parent / "file", "contains"),
        (lambda bundle: bundle.parent / "model", "contains"),
        (lambda bundle: os.path.relpath(bundle / "model.onnx"), "contains"),
        (lambda bundle: bundle / ".." / "bundle" / "model.onnx", "contains"),
    ],
    ids=[
        "target",
        "file",
        "folder",
        "link to it",
        "link to a file",
        "folder with a link",
        "relative",
        "dots",
    ],
)
def test_a_target_that_holds_a_source_is_refused(bundle, source, word):
    (bundle.parent / "into").symlink_to(bundle)
    (bundle.parent / "file").symlink_to(bundle / "model.onnx")
    (bundle.parent / "model").mkdir()
    (bundle.parent / "model" / "weights").symlink_to(bundle / "model.onnx")
    given = source(bundle)
    assert refuses(bundle, f"bundle {word} {given}, which is read", sources=[None, 3, "owner/name", given])


def test_a_target_inside_a_source_leaves_the_rest_of_it_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    replace(tmp_path / "model" / "out", sources=[tmp_path / "model"])
    replace(tmp_path / "model" / "out2", sources=[tmp_path / "model"])
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_the_working_directory_is_refused(bundle, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(bundle)
    for here, word in ((bundle, "is"), (bundle / "engines", "contains")):
        monkeypatch.chdir(here)
        assert refuses(bundle, f"bundle {word} the working directory")
    monkeypatch.chdir(tmp_path / "link")
    assert refuses(Path("."), f"{bundle} is the working directory")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert refuses(Path("."), "is the working directory")
    monkeypatch.chdir(tmp_path)
    replace(Path("bundle"))


def test_links_are_followed_to_what_is_judged_and_written(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    (tmp_path / "ahead").symlink_to(tmp_path / "later")
    (bundle / "mine").write_text("")
    assert refuses(tmp_path / "link", f"{bundle} holds mine")
    (bundle / "mine").unlink()
    replace(tmp_path / "link")
    replace(tmp_path / "ahead")
    assert (tmp_path / "link").is_symlink()
    assert replaced(bundle)
    assert replaced(tmp_path / "later")


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert refuses(tmp_path / "a", "symbolic link in a circle")
    with pytest.raises(ChaiError, match="in a circle"), atomic_file(tmp_path / "a"):
        pass


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    assert refuses(tmp_path / "file", "file is a file; choose an output directory")
    assert refuses(tmp_path / "pipe", "pipe is a file; choose an output directory")


def test_a_name_that_is_not_utf_8_is_refused_before_the_work(tmp_path):
    assert refuses(tmp_path / os.fsdecode(b"b\xff"), "is not valid UTF-8")
    assert refuses(tmp_path / os.fsdecode(b"\xff") / "b", "is not valid UTF-8")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_mount_points_are_refused(bundle, tmp_path):
    (tmp_path / "volume").mkdir()
    inside = bundle / "engines"
    for place in (tmp_path / "volume", inside):
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=False).returncode:
            pytest.skip("mounting is not allowed here")
    try:
        assert refuses(tmp_path / "volume", "volume is a mount point")
        assert refuses(bundle, "holds engines/")
    finally:
        for place in (tmp_path / "volume", inside):
            subprocess.run(["umount", place], check=True)


def clusters() -> Clusters:
    return Clusters((1, 2), num_kv_heads=2, error_curves=((1.0, 0.0), (1.0, 0.5)))


@pytest.mark.parametrize("name", ["curves.png", "curves.svg", "curves.pdf", "clusters.json"])
def test_a_file_is_replaced_by_its_own_kind_only(tmp_path, name):
    path = tmp_path / name
    save = clusters().save if name.endswith("json") else lambda path: plot_curves(clusters(), path)
    path.touch()  # as mktemp makes it
    for _ in range(3):
        save(path)
    path.write_text("mine")
    with pytest.raises(ChaiError, match=f"{name} exists and is not a"):
        save(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("kind", [CLUSTERS, PICTURE, None], ids=["clusters", "picture", "any"])
def test_what_is_no_file_or_a_source_is_never_replaced_by_one(tmp_path, kind: FileKind | None):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "text").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "text")
    before = snapshot(tmp_path)
    for name, word in (
        ("pipe", "no regular file"), ("null", "no regular file"), ("folder", "is a directory"),
        ("text", "text is"), ("link", "text is"), ("hard", "hard is"),
    ):  # fmt: skip
        if name == "hard":
            os.link(tmp_path / "text", tmp_path / "hard")
        with (
            pytest.raises(ChaiError, match=word),
            atomic_file(tmp_path / name, kind, sources=[tmp_path / "text"]),
        ):
            pytest.fail("the work began")
    (tmp_path / "hard").unlink()
    assert snapshot(tmp_path) == before


def test_a_target_that_changes_while_the_work_is_done_is_left_alone(bundle):
    def write() -> None:
        with atomic_directory(bundle, BUNDLE):
            (bundle / "notes.txt").write_text("made meanwhile")

    with pytest.raises(ChaiError, match="bundle holds notes"):
        write()
    assert (bundle / "notes.txt").read_text() == "made meanwhile"
    assert (bundle / "model.onnx").is_file()
    (bundle / "notes.txt").unlink()
    assert Bundle.load(bundle).path == bundle
