"""Output is complete or absent, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chai_export.bundle import atomic
from chai_export.bundle.atomic import atomic_directory, atomic_file
from chai_export.errors import ChaiError

WRITER = """
import sys, time
from chai_export.bundle.atomic import atomic_directory
with atomic_directory(sys.argv[1]) as directory:
    (directory / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
LIMITED = """
import resource, sys
from chai_export.bundle.atomic import atomic_directory
from chai_export.errors import ChaiError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    with atomic_directory(sys.argv[1]) as directory:
        (directory / "weights").write_bytes(bytes(100_000))
except ChaiError as error:
    print(error)
"""


def fill(directory: Path, content: str = "new") -> None:
    (directory / "manifest.json").write_text(content)


def write_and_fail(path: Path, error: BaseException) -> None:
    with atomic_directory(path) as directory:
        fill(directory)
        raise error


def listing(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_directory_appears_only_when_the_block_succeeds(tmp_path):
    with atomic_directory(tmp_path / "deep" / "out") as directory:
        fill(directory)
        assert not (tmp_path / "deep" / "out").exists()
    assert listing(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "manifest.json").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("bug"), ChaiError("cause; fix"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_behind_and_passes_through(tmp_path, error):
    with pytest.raises(type(error)):
        write_and_fail(tmp_path / "deep" / "out", error)
    assert listing(tmp_path) == []


def test_an_error_leaves_the_earlier_output_as_it_was(tmp_path):
    with atomic_directory(tmp_path / "out") as directory:
        fill(directory, "old")
    with pytest.raises(RuntimeError):
        write_and_fail(tmp_path / "out", RuntimeError("bug"))
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"
    assert listing(tmp_path) == ["out"]


def test_earlier_output_is_replaced_as_a_whole(tmp_path):
    with atomic_directory(tmp_path / "out") as directory:
        fill(directory, "old")
        (directory / "stale").write_text("")
    with atomic_directory(tmp_path / "out") as directory:
        fill(directory)
    assert listing(tmp_path / "out") == ["manifest.json"]
    assert listing(tmp_path) == ["out"]


def test_a_directory_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ChaiError, match=r"holds no manifest\.json"), atomic_directory(tmp_path):
        pass
    assert listing(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ChaiError, match="out is a file"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(ChaiError, match="cannot be created"), atomic_directory(tmp_path / "out" / "x"):
        pass


def test_kill_9_leaves_no_output_and_the_next_run_cleans_up(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "out"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    with atomic_directory(tmp_path / "out") as directory:  # a living writer is left alone
        fill(directory)
    assert len(listing(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with atomic_directory(tmp_path / "out") as directory:
        fill(directory)
    assert listing(tmp_path) == ["out"]


def test_output_set_aside_by_a_killed_run_comes_back(tmp_path):
    with atomic_directory(tmp_path / "out") as directory:
        fill(directory, "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # killed between the two renames
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_a_file_too_large_for_the_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"no space left to write {tmp_path / 'out'}")
    assert done.stdout.count("\n") == 1
    assert listing(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_full_tmpfs_is_one_line_and_leaves_nothing(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ChaiError, match="no space left"), atomic_directory(tmp_path / "out") as directory:
            (directory / "weights").write_bytes(bytes(1 << 20))
        assert listing(tmp_path) == []
        with pytest.raises(ChaiError, match="mount point"), atomic_directory(tmp_path):
            pass
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_recognised_behind_an_error_that_hides_it(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: atomic.shutil._ntuple_diskusage(10, 10, 0))
    with (
        pytest.raises(ChaiError, match=r"no space left .*stream writer failed"),
        atomic_directory(tmp_path / "o"),
    ):
        raise RuntimeError("stream writer failed")


def test_an_unwritable_place_is_one_line(tmp_path, monkeypatch):
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ChaiError, match=r"cannot be written \(Read-only"), atomic_directory(tmp_path / "out"):
        pass


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "out"):
        (tmp_path / "input").read_text()
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "input"))


def test_file_is_replaced_in_one_step(tmp_path):
    def write(content: str, error: Exception | None) -> None:
        with atomic_file(tmp_path / "f") as file:
            file.write_text(content)
            if error:
                raise error

    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError):
        write("half", RuntimeError("bug"))
    assert (tmp_path / "f").read_text() == "old"
    write("new", None)
    assert (tmp_path / "f").read_text() == "new"
    assert listing(tmp_path) == ["f"]


def test_a_pipe_or_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ChaiError, match="no regular file"), atomic_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
