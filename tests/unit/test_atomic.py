"""Output is complete or absent, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from chai_export.bundle import atomic, exchange, work_directory
from chai_export.bundle.atomic import atomic_directory, atomic_file, reserved
from chai_export.bundle.lock import holder
from chai_export.bundle.targets import DirectoryKind
from chai_export.errors import ChaiError

WRITER = """
import sys, time
from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.parts import BUNDLE
with atomic_directory(sys.argv[1], BUNDLE) as directory:
    (directory / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
LIMITED = """
import resource, sys
from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.parts import BUNDLE
from chai_export.errors import ChaiError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    with atomic_directory(sys.argv[1], BUNDLE) as directory:
        (directory / "weights").write_bytes(bytes(100_000))
except ChaiError as error:
    print(error)
"""
NOBODY = 65534
WRITING = {"atomic.py", "work_directory.py", "lock.py", "exchange.py"}


def parts(directory: Path) -> set[str] | None:
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
    return names if "mark" in names else None


KIND = DirectoryKind("an output of this test", parts)


def fill(directory: Path, content: str = "new") -> None:
    (directory / "mark").write_text(content)
    (directory / "sub").mkdir()
    (directory / "sub" / "part").write_text(content)


def write(path: Path, content: str, error: BaseException | None = None) -> None:
    with atomic_directory(path, KIND) as directory:
        fill(directory, content)
        if error is not None:
            raise error


def content(path: Path) -> str:
    """What a complete output was made with: "old" or "new"."""
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert files == ["mark", "sub/part"]
    (text,) = {(path / name).read_text() for name in files}
    return text


def listing(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture(params=["exchanged", "renamed twice"])
def replacing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of putting a new directory in the place of an old one."""
    if request.param == "renamed twice":
        monkeypatch.setattr(exchange, "exchange", lambda one, other: False)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A directory, and rights that end where those of a user end."""
    folder = Path(tempfile.mkdtemp(prefix="chai-test-", dir="/tmp"))
    root = os.geteuid() == 0
    if root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_directory_appears_only_when_the_block_succeeds(tmp_path):
    with atomic_directory(tmp_path / "deep" / "out", KIND) as directory:
        fill(directory)
        assert not (tmp_path / "deep" / "out").exists()
    assert listing(tmp_path / "deep") == ["out"]
    assert content(tmp_path / "deep" / "out") == "new"


@pytest.mark.parametrize("error", [RuntimeError("bug"), ChaiError("cause; fix"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_behind_and_passes_through(tmp_path, error):
    with pytest.raises(type(error)):
        write(tmp_path / "deep" / "out", "new", error)
    assert listing(tmp_path) == []


def test_an_error_leaves_the_earlier_output_as_it_was(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        write(tmp_path / "out", "new", RuntimeError("bug"))
    assert content(tmp_path / "out") == "old"
    assert listing(tmp_path) == ["out"]


@pytest.mark.usefixtures("replacing")
def test_earlier_output_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").write_text("")
    write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "new"
    assert listing(tmp_path) == ["out"]


def test_two_names_are_exchanged_in_one_step_here(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not exchange.exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange names")
    assert (listing(tmp_path / "one"), listing(tmp_path / "other")) == (["other"], ["one"])
    assert not exchange.exchange(tmp_path / "one", tmp_path / "nothing")


class InterruptAt:
    """Raises KeyboardInterrupt before the n-th line of our code that writes, as a signal would."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if Path(frame.f_code.co_filename).name not in WRITING:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.usefixtures("replacing")
@pytest.mark.parametrize("earlier", [None, "old"])
def test_an_interruption_at_any_line_leaves_the_old_or_the_new_output_and_nothing_else(tmp_path, earlier):
    before, seen, count = sys.gettrace(), set(), 0
    out = tmp_path / "in" / "out"
    while True:
        count += 1
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        if earlier is not None:
            write(out, earlier)
        interrupt = InterruptAt(count)
        sys.settrace(interrupt)
        try:
            write(out, "new")
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        work_directory._release_all()  # as at the end of the process
        found = content(out) if out.exists() else None
        seen.add(found)
        assert found in {earlier, "new"}, count
        assert listing(tmp_path) == ([] if found is None else ["in"]), count
        assert found is None or listing(tmp_path / "in") == ["out"], count
        if interrupt.left > 0:  # the writer has fewer lines
            break
    assert count > 50
    assert seen == {earlier, "new"}


def test_a_reader_that_comes_between_two_renames_finds_the_output(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    monkeypatch.setattr(exchange, "exchange", lambda one, other: False)
    readers, found, rename = [], [], os.rename

    def look_then_rename(one: Path, other: Path) -> None:
        if not (tmp_path / "out").exists():
            reader = threading.Thread(target=lambda: found.append(work_directory.recover(tmp_path / "out")))
            readers.append(reader)
            reader.start()
            reader.join(0.05)
        rename(one, other)

    monkeypatch.setattr(os, "rename", look_then_rename)
    write(tmp_path / "out", "new")
    for reader in readers:
        reader.join()
    assert found == [True]
    assert content(tmp_path / "out") == "new"


def set_aside(path: Path) -> Path:
    """As a process leaves it that was killed between two renames."""
    work = work_directory.work_path(path)
    work.mkdir()
    (work / "lock").write_text("1 gone")
    path.rename(work / "old")
    return work


def test_output_set_aside_by_a_killed_process_comes_back_for_the_next_writer(tmp_path):
    write(tmp_path / "out", "old")
    set_aside(tmp_path / "out")
    with pytest.raises(RuntimeError):
        write(tmp_path / "out", "new", RuntimeError("bug"))
    assert content(tmp_path / "out") == "old"
    assert listing(tmp_path) == ["out"]


def test_output_set_aside_by_a_killed_process_comes_back_for_a_reader(tmp_path):
    write(tmp_path / "out", "old")
    set_aside(tmp_path / "out")
    assert work_directory.recover(tmp_path / "out")
    assert content(tmp_path / "out") == "old"
    assert listing(tmp_path) == ["out"]
    assert not work_directory.recover(tmp_path / "nothing")
    assert not work_directory.recover(tmp_path / ("x" * 300))


def start_writer(path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_second_writer_waits_aloud_and_then_says_who_holds_the_target(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(work_directory, "_SILENCE", 0.0)
    process = start_writer(tmp_path / "out")
    try:
        with (
            pytest.raises(ChaiError, match=rf"out is being written by process {process.pid}; wait until"),
            atomic_file(tmp_path / "out", patience=0.2),
        ):
            pass
        waiting = f"waiting for process {process.pid}, which is writing {tmp_path / 'out'}"
        assert " ".join(capsys.readouterr().err.split()) == waiting
    finally:
        process.kill()
        process.communicate()


def test_a_waiting_writer_goes_on_when_the_other_is_killed_and_cleans_up_after_it(tmp_path):
    process = start_writer(tmp_path / "out")
    threading.Timer(0.2, process.send_signal, [signal.SIGKILL]).start()
    write(tmp_path / "out", "new")
    process.communicate()
    assert content(tmp_path / "out") == "new"
    assert listing(tmp_path) == ["out"]


def test_reserving_keeps_writers_out_and_writes_nothing(tmp_path):
    with reserved(tmp_path / "a" / "out"):
        waiting = threading.Thread(target=write, args=(tmp_path / "a" / "out", "new"))
        waiting.start()
        waiting.join(0.05)
        assert not (tmp_path / "a" / "out").exists()
    waiting.join()
    assert content(tmp_path / "a" / "out") == "new"
    with reserved(tmp_path / "b" / "out"):
        pass
    assert listing(tmp_path) == ["a"]


def test_one_thread_naming_a_target_twice_is_told_so_instead_of_waiting_for_itself(tmp_path):
    with atomic_file(tmp_path / "x") as file:
        file.write_text("kept")
        with pytest.raises(ChaiError, match="x is named for two outputs"), atomic_file(tmp_path / "x"):
            pass
    assert (tmp_path / "x").read_text() == "kept"


def test_a_lock_file_removed_by_its_last_owner_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    flock, done = fcntl.flock, []

    def lock_late(descriptor: int, operation: int) -> None:
        if not done:  # the last owner finishes between our opening of the lock and our locking
            done.append(True)
            shutil.rmtree(work_directory.work_path(tmp_path / "x"))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    work = work_directory.acquire(tmp_path / "x")
    assert (work.path / "lock").exists()
    assert holder(work.path) == f"process {os.getpid()}"
    work.release()
    assert listing(tmp_path) == []


def test_a_forked_child_leaves_the_work_of_its_parent_alone(tmp_path):
    with atomic_file(tmp_path / "x") as file:
        file.write_text("kept")
        child = os.fork()
        if child == 0:
            work_directory._release_all()
            os._exit(0)
        os.waitpid(child, 0)
    assert (tmp_path / "x").read_text() == "kept"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ChaiError, match="file system without file locks"), atomic_file(tmp_path / "a" / "x"):
        pass
    assert listing(tmp_path) == []


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
        with (
            pytest.raises(ChaiError, match="no space left"),
            atomic_directory(tmp_path / "out", KIND) as directory,
        ):
            (directory / "weights").write_bytes(bytes(1 << 20))
        assert listing(tmp_path) == []
        (tmp_path / "hog").write_bytes(bytes(56 * 1024))  # not even the work directory fits
        for number in range(20):
            with suppress(ChaiError), atomic_file(tmp_path / f"deep{number}" / "x") as file:
                file.write_text("x" * 4096)
        assert not [name for name in listing(tmp_path) if name.startswith(".")]
        with pytest.raises(ChaiError, match="mount point"), atomic_directory(tmp_path, KIND):
            pass
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_recognised_behind_an_error_that_hides_it(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: atomic.shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ChaiError, match=r"no space left .*stream writer failed"):
        write(tmp_path / "o", "new", RuntimeError("stream writer failed"))


def test_an_unwritable_place_is_one_line(as_nobody):
    folder = as_nobody / "closed"
    folder.mkdir(mode=0o500)
    for path in (folder / "out", folder / "deep" / "out"):
        with pytest.raises(ChaiError, match=r"out cannot be written \(Permission denied in .*closed"):
            write(path, "new")
    assert listing(folder) == []


def test_output_whose_folders_were_made_read_only_is_replaced_without_leftovers(as_nobody):
    write(as_nobody / "out", "old")
    (as_nobody / "out" / "sub").chmod(0o500)
    write(as_nobody / "out", "new")
    assert listing(as_nobody) == ["out"]


def test_a_working_directory_that_cannot_be_looked_at_is_no_obstacle(monkeypatch, as_nobody):
    inside = as_nobody / "closed" / "here"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    inside.parent.chmod(0)
    try:
        write(as_nobody / "out", "new")
        write(as_nobody / "out", "newer")
    finally:
        inside.parent.chmod(0o700)
    assert listing(as_nobody) == ["closed", "out"]


def test_a_file_in_the_way_of_a_parent_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ChaiError, match=r"file/x cannot be written \(.*file is no directory\)"):
        write(tmp_path / "file" / "x", "new")


@pytest.mark.parametrize("thing", ["file", "link"])
def test_something_else_by_the_name_of_the_work_directory_is_named_and_left_alone(tmp_path, thing):
    hidden = work_directory.work_path(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "new").write_text("mine")
    if thing == "file":
        hidden.write_text("mine")
    else:
        hidden.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ChaiError, match=r"out\.chai-partial is in the way\); choose another"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "elsewhere" / "new").read_text() == "mine"
    assert hidden.is_symlink() or hidden.read_text() == "mine"


def test_a_place_that_is_removed_meanwhile_is_named(tmp_path):
    (tmp_path / "place").mkdir()

    def write_into_moved() -> None:
        with atomic_file(tmp_path / "place" / "x") as file:
            file.write_text("")
            (tmp_path / "place").rename(tmp_path / "moved")

    with pytest.raises(ChaiError, match="place was moved or removed meanwhile"):
        write_into_moved()


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "out", KIND):
        (tmp_path / "input").read_text()
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "out", KIND):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "input"))


@pytest.mark.parametrize(
    "name", [b"n" * 255, "ü".encode() * 127, b"not \xff UTF-8", b"\xfe" * 255, b".hidden", b"[*]?"],
    ids=["255 letters", "254 bytes", "not UTF-8", "255 bytes not UTF-8", "hidden", "pattern"],
)  # fmt: skip
def test_every_name_that_a_file_can_have_works(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    for text in ("old", "new"):
        with atomic_file(path) as file:
            file.write_text(text)
    assert path.read_text() == "new"
    assert listing(tmp_path) == [path.name]


def test_names_too_long_are_named_and_nothing_else_is(tmp_path):
    for name in ("n" * 256, "ü" * 128):
        with pytest.raises(ChaiError) as caught, atomic_file(tmp_path / name):
            pass
        assert str(caught.value).startswith(f"{tmp_path / name} cannot be written (File name too long)")
        assert "chai-partial" not in str(caught.value)


def test_two_long_names_with_the_same_beginning_do_not_share_a_work_directory(tmp_path):
    with atomic_file(tmp_path / ("n" * 254 + "a")) as one, atomic_file(tmp_path / ("n" * 254 + "b")) as other:
        one.write_text("a")
        other.write_text("b")
    assert (tmp_path / ("n" * 254 + "a")).read_text() == "a"


def test_file_is_replaced_in_one_step(tmp_path):
    def write_file(text: str, error: Exception | None) -> None:
        with atomic_file(tmp_path / "f") as file:
            file.write_text(text)
            if error:
                raise error

    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError):
        write_file("half", RuntimeError("bug"))
    assert (tmp_path / "f").read_text() == "old"
    write_file("new", None)
    assert (tmp_path / "f").read_text() == "new"
    assert listing(tmp_path) == ["f"]


def test_a_pipe_or_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ChaiError, match="no regular file"), atomic_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
