"""`chai-export package`: a bundle in the form that a server takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.arguments import whole
from chai_export.bundle.choices import Backend, Heads
from chai_export.cli.output import print_json
from chai_export.units import bytes_of

NAME = "package"
HELP = "Write a model repository for NVIDIA Triton Inference Server."
EXAMPLE = "chai-export package ./bundle --triton-server ./repository --backend tensorrt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    parser.add_argument(
        "--triton-server", metavar="DIR", type=Path, required=True, help="directory for the model repository"
    )
    parser.add_argument(
        "--name", metavar="NAME", default="chai", help="of the model on the server (default %(default)s)"
    )
    parser.add_argument(
        "--backend", metavar="NAME",
        help="that runs the bundle (default: tensorrt where it has an engine, else onnxruntime)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", choices=Heads.words(), default=Heads.CHAI, help="all: plain multi-head attention"
    )
    parser.add_argument("--max-rows", metavar="N", type=int, help="texts made at one time, as of `serve`")
    parser.add_argument("--max-waiting", metavar="N", type=int, help="texts that may wait, as of `serve`")
    parser.add_argument("--max-seq", metavar="N", type=int, help="largest prompt plus text, in tokens")
    parser.add_argument(
        "--cache-memory", metavar="SIZE", help="most memory for KV caches, such as 2GiB, as of `serve`"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Write the repository and say how to start the server."""
    from chai_export.bundle.bundle import Bundle
    from chai_export.serve.triton_server.repository import write_model_repository
    from chai_export.serve.triton_server.settings import Settings

    for flag, value, least in (
        ("--max-rows", arguments.max_rows, 1),
        ("--max-waiting", arguments.max_waiting, 0),
        ("--max-seq", arguments.max_seq, 1),
    ):
        if value is not None:
            whole(value, flag, least=least)
    memory = arguments.cache_memory
    bundle = Bundle.load(arguments.bundle)
    built = Backend.TENSORRT if Backend.TENSORRT in bundle.manifest.engines else Backend.ONNXRUNTIME
    settings = Settings(
        Backend(arguments.backend or built),
        Heads(arguments.heads),
        arguments.max_rows,
        arguments.max_waiting,
        arguments.max_seq,
        bytes_of(memory, "--cache-memory") if memory is not None else None,
    )
    directory = write_model_repository(bundle, arguments.triton_server, settings, name=arguments.name)
    command = f"tritonserver --model-repository={directory}"
    if arguments.json:
        facts = {"directory": str(directory), "model": arguments.name, "backend": settings.backend}
        print_json({**facts, "command": command})
    else:
        print(f"start the server with {command}")
    return 0
