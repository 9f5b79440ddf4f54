"""What a shell may give a command: closed, full and broken streams, narrow encodings, arguments of bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "chai_export"]


def shell(redirections: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command under bash, where every descriptor can be taken away."""
    words = [
        os.fsencode(argument) if isinstance(argument, (str, Path)) else argument for argument in arguments
    ]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *PROGRAM, *words],
        capture_output=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full"])
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_result_that_cannot_be_written_is_an_error(redirection, flags, bundle):
    ended = shell(redirection, "inspect", bundle, *flags)
    assert ended.returncode == 1
    assert ended.stdout == b""
    assert ended.stderr.startswith(b"error: standard output cannot be written (")
    assert ended.stderr.count(b"\n") == 1


def test_help_that_cannot_be_written_is_an_error():
    ended = shell("> /dev/full", "--help")
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"error: standard output cannot be written (No space left on device)")


@pytest.mark.parametrize("arguments", [("--help",), ("inspect",)])
def test_a_reader_that_has_gone_ends_the_command_without_a_word(arguments, bundle):
    full = [*arguments, bundle] if arguments == ("inspect",) else arguments
    ended = shell("| true; exit ${PIPESTATUS[0]}", *full)
    assert ended.returncode == 1
    assert ended.stderr == b""


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", "<&-", "2>&- <&-"])
def test_work_goes_on_when_nobody_can_be_told_of_it(redirection, bundle):
    ended = shell(redirection, "run", bundle, "--token-ids", "1,2", "--max-new-tokens", "2", "--json")
    assert ended.returncode == 0
    assert len(json.loads(ended.stdout)["results"][0]["token_ids"]) == 2


def test_a_closed_stdout_gives_no_file_its_number(bundle, tmp_path, tiny_model, clusters):
    ended = shell(">&-", "export", tiny_model, "--clusters", clusters, "-o", tmp_path / "b")
    assert ended.returncode == 1
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        assert (tmp_path / "b" / name).stat().st_size == record["size"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_json_is_whole_in_any_encoding(encoding, bundle):
    options = ("--prompt", "é \N{GRINNING FACE}", "--max-new-tokens", "2", "--json")
    ended = shell("", "run", bundle, *options, PYTHONIOENCODING=encoding)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.decode(encoding))["results"][0]["prompt"] == "é \N{GRINNING FACE}"


def test_help_is_printed_in_any_encoding():
    ended = shell("", "calibrate", "--help", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0
    assert b"--probe-tokens" in ended.stdout


@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--token-ids"])
def test_an_argument_of_other_bytes_is_named(flag, bundle):
    ended = shell("", "run", bundle, flag, b"\xff\xfe")
    assert ended.returncode == 2
    error = ended.stderr.splitlines()[-1]
    assert error.startswith(b"error: argument " + flag.encode())
    assert b"is not UTF-8 text" in error
    assert sum(line.startswith(b"error: ") for line in ended.stderr.splitlines()) == 1


def test_a_prompt_of_other_bytes_is_named_with_its_file(bundle, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"one\n\xff\xfe\n")
    ended = shell("", "run", bundle, "--prompt-file", tmp_path / "prompts.txt")
    assert ended.returncode == 1
    assert b"prompts.txt is not UTF-8 text" in ended.stderr
