"""`chai-export serve`: an OpenAI-compatible server for a bundle."""

from __future__ import annotations

import argparse
import importlib
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from chai_export.arguments import whole
from chai_export.bundle.choices import Backend, Heads
from chai_export.cli.output import print_json
from chai_export.errors import ChaiError, UsageError
from chai_export.progress import note
from chai_export.units import bytes_of, bytes_text

NAME = "serve"
HELP = "Serve a bundle over HTTP, in OpenAI's form."
EXAMPLE = "chai-export serve ./bundle --port 8000 --api-key-file keys.txt"

_LOOPBACK = ("127.", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    parser.add_argument("--host", metavar="H", default="127.0.0.1", help="address (default %(default)s)")
    parser.add_argument(
        "--port", metavar="N", type=int, default=8000, help="0 takes a free one (default %(default)s)"
    )
    parser.add_argument(
        "--max-rows", metavar="N", type=int,
        help="texts made at one time (default 16, or what an engine was built for)",
    )  # fmt: skip
    parser.add_argument(
        "--max-waiting", metavar="N", type=int, default=64,
        help="texts that may wait; beyond them clients are sent away (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--api-key-file", metavar="F", type=Path, help="keys, one a line, of which clients must send one"
    )
    parser.add_argument("--max-seq", metavar="N", type=int, help="largest prompt plus text, in tokens")
    parser.add_argument(
        "--cache-memory", metavar="SIZE",
        help="most memory for KV caches, such as 2GiB (default: for the longest texts on all rows, at most "
        "half of what is free)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", metavar="NAME", default=Backend.ONNXRUNTIME, help="(default %(default)s)"
    )
    parser.add_argument(
        "--heads", choices=Heads.words(), default=Heads.CHAI, help="all: plain multi-head attention"
    )
    parser.add_argument(
        "--ray", action="store_true", help="run replicas on Ray Serve; --max-rows and the like are of each"
    )
    parser.add_argument("--replicas", metavar="N", type=int, help="with --ray (default 1)")
    parser.add_argument(
        "--by-session", action="store_true",
        help="with --ray: requests with one x-session-id go to the replica that has their beginnings cached",
    )  # fmt: skip


def execute(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from chai_export.serve.model import open_model

    api = _api()
    whole(arguments.port, "--port", least=0, most=65535)
    if arguments.replicas is not None:
        whole(arguments.replicas, "--replicas")
        if not arguments.ray:
            raise UsageError("--replicas are started by Ray; give --ray too")
    if arguments.by_session and not arguments.ray:
        raise UsageError("--by-session is for replicas; give --ray too")
    memory = arguments.cache_memory
    keys = [] if arguments.api_key_file is None else api["guards"].read_keys(arguments.api_key_file)
    listener = api["server"].listen(arguments.host, arguments.port)  # before the weights are read
    url = api["server"].url_of(listener)
    try:
        options = {
            "backend": arguments.backend,
            "heads": arguments.heads,
            "max_rows": arguments.max_rows,
            "max_waiting": arguments.max_waiting,
            "max_seq": arguments.max_seq,
            "cache_memory": bytes_of(memory, "--cache-memory") if memory is not None else None,
        }
        if arguments.ray:
            return _serve_replicas(arguments, keys, listener, url, options)
        model = open_model(arguments.bundle, **options)
    except BaseException:
        listener.close()
        raise
    pages, *_ = model.engine.batch.pages
    length = model.session.page_length
    facts = {
        "url": url,
        "model": model.name,
        "max_seq": model.positions,
        "max_rows": model.engine.rows,
        "cache_tokens": pages * length,
        "cache_bytes": model.session.pool_bytes,
    }

    def ready() -> None:
        if arguments.json:
            print_json(facts)
            sys.stdout.flush()
        note(
            f"{model.name} at {url}/v1: {model.engine.rows} rows, texts of up to {model.positions} tokens, "
            f"a cache of {pages} pages of {length} tokens ({bytes_text(int(facts['cache_bytes']))})"
        )
        if not keys and not arguments.host.startswith(_LOOPBACK):
            note(f"anybody who reaches {arguments.host} can use it; --api-key-file asks for keys")

    try:
        api["server"].serve(api["app"].make_app(model, keys), listener, ready)
    finally:
        model.close()
    note("ended")
    return 0


def _serve_replicas(
    arguments: argparse.Namespace,
    keys: list[str],
    listener: socket.socket,
    url: str,
    options: dict[str, Any],
) -> int:
    """Run replicas until a signal comes. What is wrong with the bundle is found here, not in each of them."""
    fleet: Any = importlib.import_module("chai_export.serve.api.fleet")
    from chai_export.serve.model import open_model

    model = open_model(arguments.bundle, **options)
    options["max_rows"] = model.engine.rows
    model.close()
    replicas = arguments.replicas or 1
    app = fleet.application(
        arguments.bundle, replicas=replicas, by_session=arguments.by_session, keys=keys, **options
    )
    port = listener.getsockname()[1]
    listener.close()  # Ray listens itself
    try:
        fleet.start(app, arguments.host, port)
        if arguments.json:
            print_json({"url": url, "model": arguments.bundle.resolve().name, "replicas": replicas})
            sys.stdout.flush()
        note(f"{replicas} replicas at {url}/v1")
        threading.Event().wait()
    except KeyboardInterrupt:
        note("ending: running texts are finished")
    finally:
        fleet.stop()
    note("ended")
    return 0


def _api() -> dict[str, Any]:
    """The modules that need packages of the extra.

    Raises:
        ChaiError: one of the packages is missing.
    """
    names = ("app", "guards", "server")
    try:
        return {name: importlib.import_module(f"chai_export.serve.api.{name}") for name in names}
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("chai_export"):
            raise
        raise ChaiError(
            f"serving needs {error.name}, which is not installed; pip install 'chai-export[serve]'"
        ) from error
