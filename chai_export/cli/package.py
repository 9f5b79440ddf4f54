"""`chai-export package`: an engine in the form that a server takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.cli.output import print_json

NAME = "package"
HELP = "Write a model repository for NVIDIA Triton Inference Server from a bundle's TensorRT engine."
EXAMPLE = "chai-export package ./bundle --triton-server ./repository"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle with a TensorRT engine")
    parser.add_argument(
        "--triton-server", metavar="DIR", type=Path, required=True, help="directory for the model repository"
    )
    parser.add_argument(
        "--name", metavar="NAME", default="chai", help="of the model on the server (default %(default)s)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Write the repository and say how to start the server."""
    from chai_export.bundle.bundle import Bundle
    from chai_export.engines.triton_server import START_FILE, write_model_repository

    directory = write_model_repository(
        Bundle.load(arguments.bundle), arguments.triton_server, name=arguments.name
    )
    if arguments.json:
        print_json(
            {"directory": str(directory), "start": str(directory / START_FILE), "model": arguments.name}
        )
    else:
        print(f"start the server with {directory / START_FILE}")
    return 0
