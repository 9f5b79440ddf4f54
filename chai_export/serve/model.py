"""A bundle made ready to serve: what a text may be, and the engine that makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from chai_export.arguments import MOST, whole
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.errors import ChaiError
from chai_export.runtime.detokenizer import Detokenizer
from chai_export.runtime.prompts import require_fits
from chai_export.runtime.request import Limits, Request
from chai_export.runtime.sampling import Sampler, SamplingSettings
from chai_export.runtime.scheduler import longest_call
from chai_export.runtime.session import SharingSession, open_session, require_heads
from chai_export.runtime.stopping import StopStrings
from chai_export.serve.batch import Batch, Shape
from chai_export.serve.engine import Engine
from chai_export.serve.job import Event, Job

DEFAULT_MAX_ROWS = 16
DEFAULT_MAX_WAITING = 64


class ServedModel:
    """A bundle with its tokenizer and a running engine. Get one from :func:`open_model`.

    Attributes:
        name: what clients call it: the name of the bundle's directory.
        positions: most tokens of a prompt with its text.
        flag: what a client can do about a longer one.
        engine: takes the jobs.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: SharingSession,
        tokenizer: Any,
        *,
        max_rows: int,
        max_waiting: int,
        pages: int,
        positions: int,
        flag: str,
        reuse: bool,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.name = bundle.path.resolve().name
        self.tokenizer = tokenizer
        self.positions = positions
        self.flag = flag
        self.session = session
        shape = Shape(
            self.manifest.probe_tokens,
            self.manifest.num_query_heads,
            self.manifest.vocab_size,
            self.manifest.switch_lengths,
        )
        self.engine = Engine(
            lambda ended: Batch(session, shape, rows=max_rows, pages=pages, ended=ended, reuse=reuse),
            rows=max_rows,
            max_waiting=max_waiting,
        )

    def job(
        self,
        ids: list[int],
        listen: Callable[[Event], None],
        settings: SamplingSettings,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **options: Any,
    ) -> Job:
        """A job for the engine, whose ``submit`` starts it.

        Args:
            ids: the prompt.
            listen: see :class:`Job`, as are ``options``.
            settings: how tokens are chosen.
            max_new_tokens: of the text; None: as many as there are positions for.
            stop: texts that end the text.
            ignore_eos: go on after an end-of-sequence token.

        Raises:
            ChaiError: the prompt is too long.
        """
        require_fits(len(ids), self.positions, self.flag)
        eos = frozenset() if ignore_eos else frozenset(self.manifest.generation.eos_token_ids)
        limits = Limits(max_new_tokens or MOST, self.positions, eos, self.manifest.switch_lengths)
        detokenizer = Detokenizer(self.tokenizer, ids) if self.tokenizer is not None else None
        request = Request(0, list(ids), limits, Sampler(settings), StopStrings(stop), detokenizer)
        return Job(request, listen, **options)

    def close(self) -> None:
        """End all texts, and give the memory of the caches back."""
        self.engine.close()
        self.session.drop()


def open_model(
    path: str | Path,
    *,
    backend: Backend | str = Backend.ONNXRUNTIME,
    heads: Heads | str = Heads.CHAI,
    max_rows: int | None = None,
    max_waiting: int = DEFAULT_MAX_WAITING,
    max_seq: int | None = None,
    cache_memory: int | None = None,
    threads: int = 0,
    reuse: bool = True,
    need_tokenizer: bool = True,
) -> ServedModel:
    """Load a bundle and start its engine.

    Args:
        path: the bundle.
        backend: that runs it.
        heads: "chai", or "all" for plain multi-head attention.
        max_rows: texts computed at one time. Default: 16, or what the backend's engine was built for.
        max_waiting: texts that may wait for a row; beyond them clients are sent away.
        max_seq: most tokens of a prompt with its text. Default: what the model has learned.
        cache_memory: bytes that the pool of pages may take. Default: room for ``max_rows`` of the longest
            texts, or half of the memory that is free where that is less.
        threads: threads within an operator; 0 lets the backend decide.
        reuse: keep beginnings of texts for others.
        need_tokenizer: refuse a bundle without one, which takes and makes token ids only.

    Raises:
        UsageError: an argument is out of range.
        ChaiError: the bundle cannot be served, or there is no memory for its cache.
    """
    if max_rows is not None:
        whole(max_rows, "--max-rows", most=1024)
    whole(max_waiting, "--max-waiting", least=0)
    if max_seq is not None:
        whole(max_seq, "--max-seq")
    backend, heads = Backend(backend), Heads(heads)
    bundle = Bundle.load(path)
    require_heads(bundle, heads)
    tokenizer = _tokenizer(bundle) if need_tokenizer else bundle.tokenizer()  # before the weights are read
    engine = bundle.manifest.engines.get(backend) if backend is not Backend.ONNXRUNTIME else None
    build = f"`chai-export build {bundle.path} --backend {backend}"
    most_rows = DEFAULT_MAX_ROWS if engine is None else engine.max_batch
    if engine is not None and max_rows is not None and max_rows > most_rows:
        raise ChaiError(
            f"--max-rows is {max_rows} and the {backend} engine was built for {most_rows}; give less, or run "
            f"{build} --max-batch {max_rows}`"
        )
    max_rows = max_rows or min(DEFAULT_MAX_ROWS, most_rows)
    session = open_session(bundle, backend, heads, threads=threads, cache_memory=cache_memory)
    if not hasattr(session, "adopt"):
        raise ChaiError(f"{backend} does not share pages among rows; serve with --backend onnxruntime")
    sharing = cast(SharingSession, session)
    length = sharing.page_length
    longest_chunk = longest_call(bundle.manifest.probe_tokens)
    fitting, budget = sharing.budget(max_rows, longest_chunk)
    if not fitting:  # windows of fewer rows, then
        fitting, budget = sharing.budget(1, longest_chunk)
    pages = fitting // length if cache_memory is not None else fitting // length // 2
    bounds = [(MOST, "shorten it")]
    if max_seq is not None:
        bounds.append((max_seq, "shorten it, or start the server with a larger --max-seq"))
    if engine is not None:
        bounds.append((engine.max_seq, f"shorten it, or build for more with {build} --max-seq N`"))
    if bundle.manifest.max_positions is not None:
        learned = "shorten it: the model has learned no more positions"
        bounds.append((bundle.manifest.max_positions, learned))
    longest, flag = min(bounds)
    pages = min(pages, max_rows * -(-longest // length))
    if not pages:
        needed = f"a page of {length} tokens takes {sharing.page_bytes} bytes"
        raise ChaiError(f"the cache has no room for one page ({needed}); {budget.fix}")
    if pages * length < longest:
        longest, flag = pages * length, f"shorten it, or {budget.fix} of the server"
    return ServedModel(
        bundle,
        sharing,
        tokenizer,
        max_rows=max_rows,
        max_waiting=max_waiting,
        pages=pages,
        positions=longest,
        flag=flag,
        reuse=reuse,
    )


def _tokenizer(bundle: Bundle) -> Any:
    tokenizer = bundle.tokenizer()
    if tokenizer is None:
        raise ChaiError(
            f"{bundle.path} has no tokenizer, and clients send text; export it from a model with one, or "
            "make it again with --tokenizer (rewrite)"
        )
    return tokenizer
