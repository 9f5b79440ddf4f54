"""`chai-export run`: generate text with a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from chai_export.bundle.choices import Backend, Heads
from chai_export.cli.output import print_json
from chai_export.cli.storage_options import warn_of_bundle
from chai_export.errors import UsageError
from chai_export.progress import note
from chai_export.runtime.prompts import read_prompt_file
from chai_export.units import bytes_of, bytes_text

NAME = "run"
HELP = "Generate text with a bundle."
EXAMPLE = 'chai-export run ./bundle --prompt "The module provides" --max-new-tokens 64 --stream'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    prompts = parser.add_argument_group("prompts (at least one; several make a batch)")
    prompts.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may be repeated")
    prompts.add_argument("--prompt-file", metavar="FILE", type=Path, help="one prompt a line, or JSON lines")
    prompts.add_argument(
        "--token-ids", metavar="1,2,3", action="append", default=[], help="a prompt as token ids"
    )
    prompts.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--temperature", metavar="F", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", metavar="N", type=int, help="sample among the N most likely tokens")
    parser.add_argument(
        "--top-p", metavar="F", type=float, help="sample among the most likely tokens of this mass"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="same seed, same text (default: chance)")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end a text here; may be repeated"
    )
    parser.add_argument("--max-seq", metavar="N", type=int, help="largest prompt plus text, in tokens")
    parser.add_argument(
        "--cache-memory", metavar="SIZE",
        help="most memory for KV caches, such as 2GiB; prompts without room wait (default: what is free)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", metavar="NAME", default=Backend.ONNXRUNTIME, help="(default %(default)s)"
    )
    parser.add_argument(
        "--heads", choices=Heads.words(), default=Heads.CHAI, help="all: plain multi-head attention"
    )
    parser.add_argument("--stream", action="store_true", help="print text as it comes (one prompt)")


def execute(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    from chai_export.runtime.report import run_report
    from chai_export.runtime.runner import load
    from chai_export.runtime.sampling import SamplingSettings

    prompts: list[str | Sequence[int]] = [*arguments.prompt, *map(_token_ids, arguments.token_ids)]
    if arguments.prompt_file:
        prompts.extend(read_prompt_file(arguments.prompt_file))
    if not prompts:
        raise UsageError("no prompt; give --prompt TEXT, --prompt-file FILE or --token-ids 1,2,3")
    if arguments.stream and (len(prompts) > 1 or arguments.json):
        raise UsageError("--stream prints one text as it comes; give one prompt and no --json")
    names = ("temperature", "top_k", "top_p", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    SamplingSettings(**given)  # before the bundle is loaded: what is out of range is refused at once
    memory = arguments.cache_memory
    runner = load(
        arguments.bundle,
        backend=arguments.backend,
        heads=arguments.heads,
        cache_memory=bytes_of(memory, "--cache-memory") if memory is not None else None,
    )
    warn_of_bundle(runner.bundle)
    generations = runner.generate(
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        **given,
        stop=arguments.stop,
        chat=arguments.chat,
        max_seq=arguments.max_seq,
        on_text=_print_piece if arguments.stream else None,
    )
    report = run_report(runner, generations)
    if arguments.json:
        print_json(report)
        return 0
    if arguments.stream:
        print()
    else:
        for number, generation in enumerate(generations):
            if len(generations) > 1:
                print(f"[{number + 1}] {generation.prompt!r}")
            print(generation.text if generation.text is not None else generation.token_ids)
    cache = bytes_text(report["kv_cache_bytes"])
    full = bytes_text(report["kv_cache_bytes_all_heads"])
    note(
        f"{arguments.heads} heads, {report['weights']} weights on {report['backend']}: "
        f"first token {report['ttft_ms']:.0f} ms, then {report['tpot_ms']:.1f} ms per token; "
        f"KV cache {cache} (all heads: {full})"
    )
    return 0


def _print_piece(row: int, text: str) -> None:
    print(text, end="", flush=True)
    del row  # one prompt only


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--token-ids takes whole numbers with commas between, such as 1,2,3; got {text!r}"
        ) from None
