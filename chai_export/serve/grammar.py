"""Texts that follow a grammar: llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.text_tokenizer import WHOLE
from chai_export.errors import ChaiError, UsageError, reason


class Grammars:
    """Makes grammars for the tokens of one bundle.

    Args:
        directory: of the bundle.
        vocab: columns of the logits.
        eos_token_ids: that end a text; at least one is needed.
    """

    def __init__(self, directory: Path, vocab: int, eos_token_ids: Sequence[int]) -> None:
        self._file = directory / WHOLE
        self._vocab = vocab
        self._eos = list(eos_token_ids)

    def json(self, schema: Mapping[str, Any] | None) -> JsonText:
        """A text that is JSON of this schema; None: any object.

        Raises:
            UsageError: llguidance does not take the schema.
            ChaiError: llguidance or the tokenizer that it needs is missing.
        """
        wanted = {"type": "object"} if schema is None else schema
        llguidance, tokenizer = self._tokenizer
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(wanted))
            matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
            problem = matcher.get_error()
        except Exception as error:  # it raises ValueError, and others for what is no schema at all
            problem = reason(error)
        if problem:
            raise UsageError(f"response_format has a schema that cannot be followed: {reason(problem)}")
        return JsonText(matcher, self._vocab)

    @cached_property
    def _tokenizer(self) -> tuple[Any, Any]:
        try:
            import llguidance
        except ImportError as error:
            raise ChaiError(
                "response_format needs llguidance on the server; install it with "
                "pip install 'chai-export[serve]'"
            ) from error
        if not self._eos:
            raise ChaiError(
                "response_format needs an end-of-sequence token, and the bundle names none; leave it out"
            )
        try:
            text = self._file.read_text(encoding="utf-8")
            return llguidance, llguidance.LLTokenizer(text, n_vocab=self._vocab, eos_token=self._eos)
        except Exception as error:
            raise ChaiError(
                f"response_format needs a {WHOLE} that llguidance reads ({reason(error)}); leave it out"
            ) from error


class JsonText:
    """Leaves of the logits those of tokens that may come next."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._allowed = np.zeros(-(-vocab // 32), np.uint32)

    def edit(self, logits: NDArray[np.float32], new_ids: Sequence[int]) -> None:
        """Set the logits of tokens that may not come to minus infinity.

        Raises:
            ChaiError: llguidance gives up, as on a grammar that explodes.
        """
        del new_ids
        self._matcher.unsafe_compute_mask_ptr(self._allowed.ctypes.data, self._allowed.nbytes)
        self._require_sound()
        bits = np.unpackbits(self._allowed.view(np.uint8), bitorder="little")[: self._vocab]
        if not bits.any():
            raise ChaiError("no token of the model's goes on with the JSON text; try another schema")
        logits[bits == 0] = -np.inf

    def chosen(self, token: int) -> None:
        """Go on with the token."""
        self._matcher.consume_token(token)
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise ChaiError(f"the schema cannot be followed any more ({reason(self._matcher.get_error())})")
