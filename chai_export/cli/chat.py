"""`chai-export chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from chai_export.bundle.choices import Backend, Heads
from chai_export.cli.output import print_json
from chai_export.cli.signals import Interrupted
from chai_export.errors import ChaiError
from chai_export.progress import note
from chai_export.units import bytes_of

if TYPE_CHECKING:
    from chai_export.serve.chat import Conversation, Turn

NAME = "chat"
HELP = "Talk with a bundle in the terminal; the cache is kept between turns."
EXAMPLE = 'chai-export chat ./bundle --system "You answer in one sentence."'

_COMMANDS = "/reset begins anew, /stats tells about tokens and times, /exit ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first turn")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=1024, help="of an answer (default %(default)s)"
    )
    parser.add_argument("--temperature", metavar="F", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", metavar="N", type=int, help="sample among the N most likely tokens")
    parser.add_argument(
        "--top-p", metavar="F", type=float, help="sample among the most likely tokens of this mass"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="same seed, same answers (default: chance)")
    parser.add_argument("--max-seq", metavar="N", type=int, help="longest conversation, in tokens")
    parser.add_argument("--cache-memory", metavar="SIZE", help="most memory for the KV cache, such as 2GiB")
    parser.add_argument(
        "--backend", metavar="NAME", default=Backend.ONNXRUNTIME, help="(default %(default)s)"
    )
    parser.add_argument(
        "--heads", choices=Heads.words(), default=Heads.CHAI, help="all: plain multi-head attention"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from chai_export.arguments import whole
    from chai_export.runtime.sampling import SamplingSettings, settings_for
    from chai_export.serve.chat import Conversation
    from chai_export.serve.model import open_model

    names = ("temperature", "top_k", "top_p", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    SamplingSettings(**given)  # before the bundle is loaded
    whole(arguments.max_new_tokens, "--max-new-tokens")
    memory = arguments.cache_memory
    model = open_model(
        arguments.bundle,
        backend=arguments.backend,
        heads=arguments.heads,
        max_rows=1,
        max_waiting=0,
        max_seq=arguments.max_seq,
        cache_memory=bytes_of(memory, "--cache-memory") if memory is not None else None,
    )
    terminal = sys.stdin is not None and sys.stdin.isatty() and not arguments.json
    try:
        conversation = Conversation(
            model,
            settings_for(model.manifest.generation, **given),
            system=arguments.system,
            max_new_tokens=arguments.max_new_tokens,
        )
        if terminal:
            with contextlib.suppress(ImportError):  # a line can be edited, where Python has it
                import readline  # noqa: F401
            note(_COMMANDS)
        turns = _talk(conversation, terminal=terminal, show=not arguments.json)
    finally:
        model.close()
    if arguments.json:
        print_json({"turns": [asdict(turn) for turn in turns], "heads": arguments.heads})
    return 0


def _talk(conversation: Conversation, *, terminal: bool, show: bool) -> list[Turn]:
    """Questions and commands until the input ends; all turns."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused in one line
    turns: list[Turn] = []
    while (line := _line(terminal=terminal)) is not None:
        command = line.strip() if line.startswith("/") else ""
        if command in ("/exit", "/quit"):
            break
        if command == "/reset":
            conversation.reset()
        elif command:
            note(conversation.stats() if command == "/stats" else _COMMANDS)
        elif line.strip():
            try:
                turns.append(conversation.ask(line, _print if show else _ignore))
            except KeyboardInterrupt as interruption:
                if not terminal or _number(interruption) != signal.SIGINT:
                    raise
            except ChaiError as error:
                if not terminal:
                    raise
                note(f"error: {error}")
            if show:
                print(flush=True)
    return turns


def _line(*, terminal: bool) -> str | None:
    """The next line of the input without its end, or None if there is none."""
    if terminal:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt as interruption:
            if _number(interruption) != signal.SIGINT:
                raise
            print()
            return None
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.rstrip("\r\n") if line else None


def _number(interruption: KeyboardInterrupt) -> int:
    return interruption.number if isinstance(interruption, Interrupted) else signal.SIGINT


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    del text
