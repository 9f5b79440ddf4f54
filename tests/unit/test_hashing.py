"""Files are hashed once, and again when they change."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from chai_export.bundle import hashing
from chai_export.bundle.hashing import cache_path, has_sha256, sha256_file
from tests.helpers.bad_files import KINDS, PLACES, put


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "_known", {})


@pytest.fixture
def digests(monkeypatch) -> list[Path]:
    """Paths that were really read."""
    read: list[Path] = []
    real = hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda path: (read.append(path), real(path))[1])
    return read


def settled(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    os.utime(path, ns=(0, 10**18))
    return path


def test_hash_is_sha256(tmp_path):
    content = os.urandom(9_000_000)
    assert sha256_file(settled(tmp_path / "f", content)) == hashlib.sha256(content).hexdigest()


def test_an_unchanged_file_is_read_once_even_by_another_process(tmp_path, digests, monkeypatch):
    path = settled(tmp_path / "f", b"x")
    first = sha256_file(path)
    monkeypatch.setattr(hashing, "_known", {})
    assert sha256_file(path) == first
    assert sha256_file(path.rename(tmp_path / "moved")) == first
    assert len(digests) == 1


def test_a_new_time_or_size_is_read_again(tmp_path, digests):
    path = settled(tmp_path / "f", b"x")
    sha256_file(path)
    path.write_bytes(b"y")
    assert sha256_file(path) == hashlib.sha256(b"y").hexdigest()
    settled(path, b"xy")
    assert sha256_file(path) == hashlib.sha256(b"xy").hexdigest()
    assert len(digests) == 3


def test_a_file_written_a_moment_ago_is_not_trusted_yet(tmp_path):
    path = tmp_path / "f"
    for content in (b"a", b"b", b"c"):  # within one tick of the file system's clock
        path.write_bytes(content)
        assert sha256_file(path) == hashlib.sha256(content).hexdigest()


ENTRIES = {
    "not a list": "x",
    "too short": [1, 2],
    "numbers as text": ["1", "2", "0" * 64],
    "no hash": [1, 2, "x"],
    "a huge number": [10**400, 2, "0" * 64],
}


@pytest.mark.parametrize("kind", [*KINDS, *ENTRIES])
def test_a_damaged_cache_counts_as_absent_and_is_written_anew(tmp_path, digests, monkeypatch, kind):
    path = settled(tmp_path / "f", b"x")
    if kind in ENTRIES:
        cache_path().parent.mkdir(parents=True)
        status = path.stat()
        key = f"{status.st_dev}:{status.st_ino}"
        cache_path().write_text(json.dumps({key: ENTRIES[kind], "1:2": ENTRIES[kind]}))
    else:
        put(kind, cache_path())
    assert sha256_file(path) == hashlib.sha256(b"x").hexdigest()
    if kind not in PLACES:  # those are somebody's
        monkeypatch.setattr(hashing, "_known", {})
        assert sha256_file(path) == hashlib.sha256(b"x").hexdigest()
        assert len(digests) == 1


def test_a_wrong_entry_is_corrected_before_a_file_is_called_changed(tmp_path, monkeypatch):
    path = settled(tmp_path / "f", b"x")
    right = sha256_file(path)
    (entry,) = json.loads(cache_path().read_text()).items()
    wrong = {entry[0]: [*entry[1][:2], "0" * 64]}
    cache_path().write_text(json.dumps(wrong))
    monkeypatch.setattr(hashing, "_known", {})
    assert has_sha256(path, right)
    monkeypatch.setattr(hashing, "_known", {})
    assert sha256_file(path) == right
    assert not has_sha256(path, "0" * 64)


def test_a_cache_path_that_is_relative_is_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_path() == tmp_path / "home" / ".cache" / "chai_export" / "hashes.json"
    monkeypatch.setenv("HOME", "nowhere")
    sha256_file(settled(tmp_path / "f", b"x"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f"]


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        sha256_file(tmp_path / "pipe")


def test_an_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sha256_file(settled(tmp_path / "f", b"x")) == hashlib.sha256(b"x").hexdigest()
