"""The runner: text, token ids or logits from a bundle, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.arguments import require_at_least_one, shown, whole, whole_numbers
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime.detokenizer import Detokenizer
from chai_export.runtime.one_at_a_time import one_at_a_time
from chai_export.runtime.prompts import Prompt, encode_prompt, require_fits, require_stops_possible
from chai_export.runtime.request import Limits, Request
from chai_export.runtime.row_pages import MOST_TOKENS
from chai_export.runtime.sampling import Sampler, settings_for
from chai_export.runtime.scheduler import Scheduler, chunk_length, longest_call
from chai_export.runtime.session import Session, open_session, require_heads
from chai_export.runtime.stopping import StopReason, StopStrings

DEFAULT_MAX_BATCH = 8


@dataclass(frozen=True)
class Generation:
    """The text made for one prompt.

    ``prompt`` is as given (text or ids). ``token_ids`` are the new tokens, an end-of-sequence token included;
    ``text`` is without special tokens, ends before a stop string, and is None without a tokenizer.
    ``stop_reason`` is "eos", "stop", "length" (max_new_tokens) or "capacity" (no position left).
    """

    prompt: str | list[int]
    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    stop_reason: StopReason


@dataclass(frozen=True)
class Timings:
    """Milliseconds. ``ttft_ms``: from the call to the first token, ``tpot_ms``: per token after that.

    With several prompts both are means over them, waiting for a row included; with no second token anywhere
    ``tpot_ms`` is 0.
    """

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0


def load(
    path: str | Path,
    backend: Backend | str = Backend.ONNXRUNTIME,
    heads: Heads | str = Heads.CHAI,
    *,
    max_batch: int | None = None,
    threads: int = 0,
    cache_memory: int | None = None,
) -> Runner:
    """Load a bundle.

    Args:
        path: the bundle.
        backend: "onnxruntime" or "tensorrt".
        heads: "chai", or "all" for the same graph as plain multi-head attention.
        max_batch: prompts computed at one time; more wait their turn. Default: the engine's, else 8.
        threads: threads within an operator; 0 lets the backend decide.
        cache_memory: bytes that KV caches may take; prompts that find no room wait. Default: the engine's,
            else what is free.

    Raises:
        UsageError: ``backend``, ``heads``, ``max_batch`` or ``cache_memory`` is wrong.
        ChaiError: the bundle is not valid, the backend cannot run it, or its engine was built for a smaller
            batch.
    """
    backend, heads = Backend(backend), Heads(heads)
    if max_batch is not None:
        whole(max_batch, "max_batch")
    whole(threads, "threads", least=0)
    if cache_memory is not None:
        whole(cache_memory, "--cache-memory", most=2**63 - 1)
    bundle = Bundle.load(path)
    require_heads(bundle, heads)
    engine = bundle.manifest.engines.get(backend)
    memory = engine.cache_memory if engine is not None and cache_memory is None else cache_memory
    session = open_session(bundle, backend, heads, threads=threads, cache_memory=memory)
    runner = Runner(bundle, session, backend, heads, max_batch)
    if bundle.was_replaced():  # between its check and its opening
        return load(path, backend, heads, max_batch=max_batch, threads=threads, cache_memory=cache_memory)
    return runner


@dataclass(frozen=True)
class _LastCall:
    """What a finished call leaves behind; replaced as a whole."""

    timings: Timings = Timings()
    head_maps: NDArray[np.int32] | None = None
    held_tokens: Mapping[int, int] = field(default_factory=dict)


class Runner:
    """Generates text and logits. Get one from :func:`load`.

    A runner has one set of caches, so it does one thing at a time: while :meth:`generate` or :meth:`logits`
    runs, a second call, from another thread or from inside ``on_text``, raises UsageError and disturbs
    nothing. ``timings``, ``head_maps``, ``kv_cache_bytes`` and ``kv_cache_bytes_all_heads`` tell about the
    last call that was finished.
    """

    def __init__(
        self, bundle: Bundle, session: Session, backend: Backend, heads: Heads, max_batch: int | None = None
    ) -> None:
        self.bundle = bundle
        self.session = session
        self.backend = backend
        self.heads = heads
        self._engine = bundle.manifest.engines.get(backend)
        most = self._engine.max_batch if self._engine else None
        if max_batch is not None and most is not None and max_batch > most:
            raise ChaiError(
                f"max_batch is {max_batch} and the {backend} engine was built for {most}; give less, or run "
                f"`chai-export build {bundle.path} --backend {backend} --max-batch {max_batch}`"
            )
        self._max_batch = max_batch or most or DEFAULT_MAX_BATCH
        self._running = Lock()
        self._last = _LastCall()

    @cached_property
    def tokenizer(self) -> Any | None:
        """The bundle's tokenizer, loaded on first use; None if it has none."""
        return self.bundle.tokenizer()

    @property
    def timings(self) -> Timings:
        """Of the last call of :meth:`generate`; zeros after :meth:`logits`."""
        return self._last.timings

    @property
    def head_maps(self) -> NDArray[np.int32]:
        """int32 [L,B,H] of the last call: query head to representative, in the order of its prompts.

        Raises:
            UsageError: nothing was run yet.
        """
        if self._last.head_maps is None:
            raise UsageError("there are no head maps yet; call generate or logits first")
        return self._last.head_maps

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of K and V cache that the last call's tokens took, at the moment when there were most.

        Counted are the pages that rows held; not memory set aside for growth, padding or a second buffer.
        """
        return self._held_bytes(self.heads)

    @property
    def kv_cache_bytes_all_heads(self) -> int:
        """The same positions with every KV head in the K cache."""
        return self._held_bytes(Heads.ALL)

    def _held_bytes(self, heads: Heads) -> int:
        sizes, held = self.bundle.manifest.kv_bytes_by_window(heads), self._last.held_tokens
        return sum(held.get(window, 0) * size for window, size in sizes.items())

    @one_at_a_time
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
        ignore_eos: bool = False,
        max_seq: int | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Generate a text for each prompt.

        Args:
            prompts: texts or sequences of token ids.
            max_new_tokens: tokens to make at most, for each.
            temperature: 0 is greedy.
            top_k: sample among so many tokens; 0 is off. Default: the model's, else 50 as in transformers.
            top_p: sample among the likeliest tokens of this mass. Default: the model's, else 1 (off).
            repetition_penalty: for tokens seen before. Default: the model's, else 1 (off).
            seed: the same seed gives a prompt the same text, alone or in company. Default: chance.
            stop: texts that end a text; they are left out.
            chat: give each text as a user's turn to the tokenizer's chat template.
            ignore_eos: go on after an end-of-sequence token.
            max_seq: most tokens of prompt and text together.
            on_text: called with (index of the prompt, new text) as soon as text is certain. What it raises
                ends the call and is raised here.

        Raises:
            UsageError: an argument is out of range, or another call of this runner goes on.
            ChaiError: a prompt is empty or too long, or its cache does not fit in memory.
        """
        tokenizer = self.tokenizer  # loaded now, so that loading is not counted as time to the first token
        began = perf_counter()
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise UsageError(f"prompts is {shown(prompts)}; give a list of prompts")
        prompts = list(prompts)
        whole(max_new_tokens, "--max-new-tokens")
        if on_text is not None and not callable(on_text):
            raise UsageError(f"on_text is {shown(on_text)}; give a function")
        manifest = self.bundle.manifest
        settings = settings_for(manifest.generation, temperature, top_k, top_p, repetition_penalty, seed)
        positions, flag = self._position_limit(max_seq)
        eos = frozenset() if ignore_eos else frozenset(manifest.generation.eos_token_ids)
        limits = Limits(max_new_tokens, positions, eos, manifest.switch_lengths)
        require_stops_possible(stop, tokenizer)
        requests = []
        for index, prompt in enumerate(prompts):
            ids = encode_prompt(prompt, tokenizer, manifest.vocab_size, chat=chat, name=f"prompt {index}")
            require_fits(len(ids), positions, flag)
            detokenizer = Detokenizer(tokenizer, ids) if tokenizer is not None else None
            stops = StopStrings(stop)
            requests.append(Request(index, ids, limits, Sampler(settings), stops, detokenizer, on_text))
        held = self._run(requests) if requests else {}
        maps = [r.head_map for r in requests if r.head_map is not None]
        self._last = _LastCall(_timings(requests, began), np.stack(maps, axis=1) if maps else None, held)
        return [_generation(p, r) for p, r in zip(prompts, requests, strict=True)]

    @one_at_a_time
    def logits(self, token_ids: Sequence[int], chunks: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Logits after every token of one fresh sequence: float32 [T,V].

        Args:
            token_ids: T ids.
            chunks: feed that many tokens at a time; they sum to T and the first covers the probe.

        Raises:
            UsageError: the chunks are wrong, or another call of this runner goes on.
            ChaiError: no tokens, an id outside the vocabulary, or more tokens than positions.
        """
        manifest = self.bundle.manifest
        if isinstance(token_ids, str):
            raise UsageError(f"token_ids is {shown(token_ids)}; give a list of token ids")
        ids = encode_prompt(token_ids, None, manifest.vocab_size, chat=False, name="token_ids")
        positions, flag = self._position_limit(None)
        require_fits(len(ids), positions, flag)
        self.session.begin(1, len(ids))
        result = np.empty((len(ids), manifest.vocab_size), np.float32)
        start = 0
        for length in self._chunks(len(ids), chunks):
            piece = np.asarray(ids[start : start + length], np.int64)[None]
            result[start : start + length] = self.session.step(
                piece,
                np.array([length], np.int32),
                np.array([start], np.int32),
                np.arange(length, dtype=np.int64)[None],
                np.array([len(ids)], np.int32),
            )[0]
            start += length
        self._last = _LastCall(Timings(), self.session.head_map, self.session.held_tokens)
        return result

    def _run(self, requests: list[Request]) -> Mapping[int, int]:
        """Generate for every request; the tokens that rows had pages for, by window, when those took most."""
        manifest = self.bundle.manifest
        scheduler = Scheduler(
            self.session,
            slots=min(len(requests), self._max_batch),
            query_heads=manifest.num_query_heads,
            probe_tokens=manifest.probe_tokens,
        )
        scheduler.run(requests)
        return self.session.held_tokens

    def _position_limit(self, max_seq: int | None) -> tuple[int, str]:
        """The number of positions there are, and what a user can do about it."""
        require_at_least_one(max_seq=max_seq)
        manifest = self.bundle.manifest
        bounds = [(MOST_TOKENS, "shorten it")]
        self.session.drop()  # what the last call left is no longer needed
        tokens, budget = self.session.budget(1, longest_call(manifest.probe_tokens))
        bounds.append((tokens, f"shorten it or {budget.fix}"))
        if max_seq is not None:
            bounds.append((max_seq, "shorten it or raise --max-seq"))
        if self._engine is not None:
            again = f"`chai-export build {self.bundle.path} --backend {self.backend} --max-seq N`"
            bounds.append((self._engine.max_seq, f"shorten it or build for more with {again}"))
        if manifest.max_positions is not None:
            bounds.append((manifest.max_positions, "shorten it: the model has learned no more positions"))
        return min(bounds, key=lambda bound: bound[0])

    def _chunks(self, total: int, chunks: Sequence[int] | None) -> list[int]:
        probe = self.bundle.manifest.probe_tokens
        if chunks is None:
            length = max(probe, chunk_length(self.session, 1, self.bundle.manifest.num_query_heads))
            return [min(length, total - start) for start in range(0, total, length)]
        chunks = whole_numbers(chunks, "chunks")
        if sum(chunks) != total or min(chunks, default=0) < 1:
            raise UsageError(
                f"chunks {chunks} do not divide {total} tokens; give positive numbers of this sum"
            )
        if chunks[0] < min(probe, total):
            raise UsageError(
                f"the first chunk has {chunks[0]} tokens and decides the head map from {min(probe, total)}; "
                "give it at least as many"
            )
        return chunks


def _generation(prompt: Prompt, request: Request) -> Generation:
    assert request.stop_reason is not None
    return Generation(
        prompt=prompt if isinstance(prompt, str) else [int(i) for i in prompt],
        text=request.text if request.detokenizer is not None else None,
        token_ids=request.new_ids,
        prompt_tokens=request.prompt_tokens,
        stop_reason=request.stop_reason,
    )


def _timings(requests: Sequence[Request], began: float) -> Timings:
    times = [r.token_times for r in requests]
    gaps = [1e3 * (t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1]
    first = [1e3 * (t[0] - began) for t in times]
    return Timings(float(np.mean(first)) if first else 0.0, float(np.mean(gaps)) if gaps else 0.0)
