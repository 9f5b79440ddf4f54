"""Files that users name: one line or a value, whatever lies there, and never a wait."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from chai_export.bundle.manifest import read_manifest
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.curves import ErrorCurves
from chai_export.clustering.state import load_state
from chai_export.errors import ChaiError
from chai_export.files import MissingFileError, check_plain, open_file, parse_json, read_json, read_text
from chai_export.recipe.cache import FILE_NAME, StageCache
from chai_export.recipe.recipe import load_recipe
from chai_export.report.collect import read_result
from tests.helpers.bad_files import KINDS, put

READERS = {
    "read_json": lambda path: read_json(path, fix="write it again"),
    "clusters": Clusters.load,
    "manifest": lambda path: read_manifest(path.parent),
    "result": lambda path: read_result(path, "eval", "kl"),
    "recipe": load_recipe,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_used_is_one_line_that_names_the_file(tmp_path: Path, kind: str, reader: str) -> None:
    path = put(kind, tmp_path / "manifest.json")
    with pytest.raises(ChaiError, match=r"manifest\.json") as caught:
        READERS[reader](path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_our_own_that_are_damaged_count_as_absent(tmp_path: Path, kind: str) -> None:
    """A measurement starts anew; a directory without a legible mark is not ours to write into."""
    put(kind, tmp_path / FILE_NAME)
    assert load_state(tmp_path / FILE_NAME, "key", ErrorCurves(2, 4, 4, 5)) == 0
    with pytest.raises(ChaiError, match="was not made by `chai-export make` and holds stages") as caught:
        StageCache(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_told_from_an_unreadable_one(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"there is no file .*; look again"):
        read_json(tmp_path / "x.json", fix="look again")
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingFileError):
        read_json(tmp_path / "file" / "x.json", fix="")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(ChaiError, match="Permission denied"):
        read_json(path, fix="")


def test_a_name_that_is_none_is_no_file() -> None:
    for name in ("x\0y", "x" * 300):
        with pytest.raises(ChaiError, match="cannot be read"):
            read_json(name, fix="")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ChaiError, match="more than 64 MiB"):
        read_json(path, fix="")


def test_the_pipe_of_a_shell_is_read() -> None:
    receive, send = os.pipe()
    os.write(send, b'{"x": 1}')
    os.close(send)
    try:
        assert read_json(f"/dev/fd/{receive}", fix="") == {"x": 1}
    finally:
        os.close(receive)


def test_a_reader_waits_for_a_slow_shell() -> None:
    receive, send = os.pipe()
    if os.fork() == 0:
        os.close(receive)
        os.write(send, b'{"x":')
        os.write(send, b" 1}")
        os._exit(0)
    os.close(send)
    try:
        with open_file(f"/dev/fd/{receive}") as file:
            assert os.get_blocking(file.fileno())
            assert file.read() == b'{"x": 1}'
    finally:
        os.close(receive)
        os.wait()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(tmp_path / "x", fix="") == "{}"
    assert read_json(tmp_path / "x", fix="") == {}


@pytest.mark.parametrize(
    "text", ["[9223372036854775807, -9223372036854775808, 1.5, true]", '"\\ud83d\\ude00"']
)
def test_exact_json_is_read_exactly(text: str) -> None:
    assert parse_json(text, "here", fix="") == json.loads(text)


@pytest.mark.parametrize("text", ["NaN", "1e999", "9223372036854775808", '"\\ud83d"'])
def test_files_of_other_programs_may_be_inexact(text: str) -> None:
    with pytest.raises(ChaiError, match="here is not valid JSON"):
        parse_json(text, "here", fix="")
    parse_json(text, "here", fix="", exact=False)


def test_shared_and_endless_parts_are_looked_at_once() -> None:
    bomb: Any = "x"
    for _ in range(60):
        bomb = [bomb, bomb]
    check_plain(bomb)
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested"):
        check_plain(endless)
