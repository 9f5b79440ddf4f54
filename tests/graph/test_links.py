"""Models whose file, or whose weights, are links: as in the cache of huggingface_hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph.stage import explain, rewrite
from tests.helpers.exported import bundle_of, exported, kept_of
from tests.helpers.graph_runner import GraphRunner

NAME = "llama-gqa"
DATA = "decoder.onnx.data"
PROMPT = [4, 8, 15, 16, 23, 42]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """The model's own directory, with decoder.onnx and its data."""
    directory = tmp_path / "real"
    directory.mkdir()
    source = exported(NAME)
    for file in (source, Path(f"{source}.data")):
        shutil.copy(file, directory)
    return directory


@pytest.fixture
def links(tmp_path: Path) -> Path:
    """Another directory, for links."""
    directory = tmp_path / "links"
    directory.mkdir()
    return directory


def rewritten(path: Path, tmp_path: Path) -> Bundle:
    assert explain(path).rewritable
    bundle = rewrite(path, Clusters(kept_of(NAME)), tmp_path / "bundle")
    assert not any(file.is_symlink() for file in bundle.path.iterdir())
    logits = GraphRunner(bundle, 1, 8).step([PROMPT])
    assert (logits == GraphRunner(bundle_of(NAME), 1, 8).step([PROMPT])).all()
    return bundle


def hub_cache(real: Path, tmp_path: Path, below: str) -> Path:
    """The layout of huggingface_hub: snapshots/REVISION/… with relative links to blobs/HASH."""
    root = tmp_path / "models--someone--tiny"
    snapshot = root / "snapshots" / ("c0ffee" * 6) / below
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, digest in (("decoder.onnx", "a" * 40), (DATA, "b" * 64)):
        shutil.move(real / name, root / "blobs" / digest)
        (snapshot / name).symlink_to(os.path.relpath(root / "blobs" / digest, snapshot))
    return snapshot / "decoder.onnx"


@pytest.mark.parametrize("below", ["", "onnx"])
def test_the_cache_of_huggingface_hub(below: str, real: Path, tmp_path: Path) -> None:
    path = hub_cache(real, tmp_path, below)
    blobs = {file: file.read_bytes() for file in (tmp_path / "models--someone--tiny" / "blobs").iterdir()}
    rewritten(path, tmp_path)
    assert blobs == {file: file.read_bytes() for file in blobs}
    shutil.rmtree(tmp_path / "bundle")
    rewritten(path.parent, tmp_path)


def test_a_path_relative_to_the_working_directory(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub_cache(real, tmp_path, "")
    monkeypatch.chdir(path.parent)
    rewritten(Path(path.name), tmp_path)


def test_weights_beside_the_real_file(real: Path, links: Path, tmp_path: Path) -> None:
    (links / "m.onnx").symlink_to(real / "decoder.onnx")
    rewritten(links / "m.onnx", tmp_path)


def test_weights_beside_the_link(real: Path, links: Path, tmp_path: Path) -> None:
    (links / "m.onnx").symlink_to(real / "decoder.onnx")
    shutil.move(real / DATA, links / DATA)
    rewritten(links / "m.onnx", tmp_path)


def test_weights_in_both_places(real: Path, links: Path, tmp_path: Path) -> None:
    """ONNX Runtime maps weights from one directory only; the others are handed to it."""
    model = onnx.load(real / "decoder.onnx", load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert len(outside) > 4
    for tensor in outside[::2]:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "second.data"
    onnx.save(model, real / "decoder.onnx")
    shutil.copy(real / DATA, links / "second.data")
    (links / "m.onnx").symlink_to(real / "decoder.onnx")
    rewritten(links / "m.onnx", tmp_path)


@pytest.mark.parametrize("name", ["decoder.onnx", DATA])
def test_a_file_that_was_not_downloaded(name: str, real: Path, tmp_path: Path) -> None:
    path = hub_cache(real, tmp_path, "")
    (path.parent / name).resolve().unlink()
    with pytest.raises(ChaiError, match=r"is a link to .*, which does not exist|which is missing") as caught:
        explain(path)
    assert name in str(caught.value)


def test_weights_that_a_link_takes_elsewhere(real: Path, links: Path) -> None:
    """Only where the model itself is a link may its data be: a name in a file opens no other directory."""
    shutil.move(real / DATA, links / DATA)
    (real / DATA).symlink_to(links / DATA)
    with pytest.raises(ChaiError, match="outside its directory"):
        explain(real / "decoder.onnx")


def test_weights_with_two_names_on_disk(real: Path) -> None:
    os.link(real / DATA, real / "other")
    with pytest.raises(ChaiError, match="2 hard links"):
        explain(real / "decoder.onnx")
