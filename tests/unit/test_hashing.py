"""Files are hashed once, and again when they change."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from chai_export.bundle import hashing
from chai_export.bundle.hashing import cache_path, sha256_file


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


@pytest.mark.parametrize("damage", ["not json", "[]", '{"1:2": "x"}'])
def test_a_damaged_cache_is_no_obstacle(tmp_path, damage):
    cache_path().parent.mkdir(parents=True)
    cache_path().write_text(damage)
    assert sha256_file(settled(tmp_path / "f", b"x")) == hashlib.sha256(b"x").hexdigest()


def test_an_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sha256_file(settled(tmp_path / "f", b"x")) == hashlib.sha256(b"x").hexdigest()
