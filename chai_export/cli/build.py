"""`chai-export build`: an engine inside the bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.cli.output import print_json
from chai_export.units import bytes_of

NAME = "build"
HELP = "Build an engine for a backend inside a bundle."
EXAMPLE = "chai-export build ./bundle --backend onnxruntime --max-seq 4096"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    parser.add_argument("--backend", metavar="NAME", required=True, help="onnxruntime or tensorrt")
    parser.add_argument(
        "--max-batch", metavar="N", type=int, default=8, help="largest batch (default %(default)s)"
    )
    parser.add_argument(
        "--max-seq", metavar="N", type=int, help="largest capacity in tokens (default: the model's)"
    )
    parser.add_argument(
        "--cache-memory", metavar="SIZE",
        help="most memory for KV caches, such as 2GiB (default: room for the largest batch of longest texts)",
    )  # fmt: skip
    parser.add_argument(
        "--builder-memory",
        metavar="GIB",
        type=float,
        help="tensorrt: GPU memory for the builder's workspace (default: all that is free)",
    )
    parser.add_argument(
        "--kernels",
        metavar="DIR",
        type=Path,
        help="tensorrt: kernels compiled before (default: compile them)",
    )
    parser.add_argument(
        "--alias-caches",
        action=argparse.BooleanOptionalAction,
        help="tensorrt: tell the builder that caches are appended to in place (default: yes)",
    )
    parser.add_argument(
        "--gpu", metavar="ARCHITECTURES", nargs="?", const="here",
        help="onnxruntime: compile kernels for its CUDA provider, for this machine's GPU or those named, "
        "such as sm_80,sm_90",
    )  # fmt: skip


def execute(arguments: argparse.Namespace) -> int:
    """Build and show the record."""
    from chai_export.engines.build import build

    memory = arguments.cache_memory
    record = build(
        arguments.bundle,
        backend=arguments.backend,
        max_batch=arguments.max_batch,
        max_seq=arguments.max_seq,
        cache_memory=bytes_of(memory, "--cache-memory") if memory is not None else None,
        builder_memory=None if arguments.builder_memory is None else int(arguments.builder_memory * 2**30),
        kernels=arguments.kernels,
        alias_caches=arguments.alias_caches,
        gpu=arguments.gpu,
    )
    if arguments.json:
        print_json(record.model_dump(mode="json"))
        return 0
    print(
        f"{record.backend} {record.runtime_version}: batch up to {record.max_batch}, {record.max_seq} tokens"
    )
    return 0
