"""`chai-export chat`: over a pipe and on a terminal, with the answers of `run` and a cache that is kept."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chai_export as ce
from tests.helpers.served import PROGRAM
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

MODEL = TinyModel(positions=1500, bits=(8, 4))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }},{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = letters_tokenizer(chat_template=TEMPLATE)
    return MODEL.write(tmp_path_factory.mktemp("chat") / "tiny", tokenizer=tokenizer, eos=[1]).path


def talk(command: Any, monkeypatch: Any, lines: str | bytes, *arguments: object) -> Any:
    content = lines if isinstance(lines, bytes) else lines.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
    return command("chat", *arguments)


def expected(bundle: Path, questions: list[str], begin: str = "", **options: Any) -> list[str]:
    runner, history, answers = ce.load(bundle), begin, []
    for question in questions:
        history += f"user {question},"
        ids = runner.tokenizer(history + "assistant ")["input_ids"]
        (result,) = runner.generate([ids], **options)
        answers.append(str(result.text))
        history += f"assistant {result.text},"
    return answers


def test_answers_are_those_of_the_whole_history(command, monkeypatch, bundle):
    questions = ["hello there", "what is it", "why"]
    options = ("--max-new-tokens", 12, "--system", "be kind")
    outcome = talk(command, monkeypatch, "\n".join(questions) + "\n", bundle, *options)
    assert outcome.code == 0
    answers = expected(bundle, questions, "system be kind,", max_new_tokens=12)
    assert outcome.out == "".join(f"{answer}\n" for answer in answers)
    seeded = talk(
        command, monkeypatch, "hello\nwhy\n", bundle, "--max-new-tokens", 9, "--temperature", 1, "--seed", 3
    )
    answers = expected(bundle, ["hello", "why"], max_new_tokens=9, temperature=1.0, seed=3)
    assert seeded.out.splitlines() == answers


def test_the_history_is_in_the_cache_and_a_reset_forgets_it(command, monkeypatch, bundle):
    lines = "hello there\n/stats\n\nwhat is it\n/reset\nhello there\n"
    outcome = talk(command, monkeypatch, lines, bundle, "--max-new-tokens", 12, "--json")
    first, second, third = outcome.json["turns"]
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] >= first["prompt_tokens"]
    assert third["prompt_tokens"] == first["prompt_tokens"]
    assert third["text"] == first["text"]
    assert first["new_tokens"] <= 12
    assert "1 turns, " in outcome.err
    assert talk(command, monkeypatch, "/stats\n/exit\nhello\n", bundle).out == ""


def test_what_cannot_be_talked_with_is_one_line(command, monkeypatch, bundle, tmp_path):
    silent = MODEL.write(tmp_path / "silent", tokenizer=letters_tokenizer()).path
    for code, message, lines, *arguments in (
        (1, "has no chat template; use `chai-export run`", "hi\n", silent),
        (1, "tokens and 20 fit; shorten it", "hello there, how is it\n", bundle, "--max-seq", 20),
        (1, "half of a surrogate pair", b"\xff\xfe\n", bundle),
        (2, "--temperature is -1", "hi\n", bundle, "--temperature", -1),
        (2, "--max-new-tokens is 0", "hi\n", bundle, "--max-new-tokens", 0),
    ):
        outcome = talk(command, monkeypatch, lines, *arguments)
        assert outcome.code == code
        assert message in outcome.err
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1


class Terminal:
    """Our end of a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._seen = ""

    def until(self, *texts: str) -> None:
        """Read until these have come one after another."""
        for text in texts:
            while text not in self._seen:
                ready, _, _ = select.select([self._descriptor], [], [], 30)
                assert ready, f"{text!r} did not come: {self._seen!r}"
                self._seen += os.read(self._descriptor, 1024).decode(errors="replace").replace("\r", "")
            self._seen = self._seen.split(text, 1)[1]

    def write(self, text: bytes) -> None:
        os.write(self._descriptor, text)


def test_on_a_terminal_an_answer_can_be_interrupted(tmp_path):
    """Ctrl-C ends an answer that has no end of its own, not the conversation; Ctrl-D ends that."""
    tokenizer = letters_tokenizer(chat_template=TEMPLATE)
    endless = TinyModel(positions=50_000, bits=(8, 4)).write(tmp_path / "endless", tokenizer=tokenizer).path
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", PROGRAM, "chat", str(endless), "--temperature", "1", "--seed", "1"]
    words += ["--max-new-tokens", "40000"]
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        terminal.until("> ")
        for question in (b"hello\n", b"why\n"):
            terminal.write(question)
            terminal.until(question.decode(), "a")
            process.send_signal(signal.SIGINT)
            terminal.until("\n> ")
        terminal.write(b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
