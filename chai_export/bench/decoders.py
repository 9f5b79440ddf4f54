"""Whole models, token by token: a bundle in either mode, and onnxruntime-genai on the same weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend
from chai_export.errors import ChaiError, last_line
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.heads import DecoderHeads
from chai_export.runtime.scheduler import chunk_length
from chai_export.runtime.session import open_session

Tokens = NDArray[np.int64]


class Decoder(Protocol):
    """Greedy generation for one prompt, cut where it is measured."""

    def first(self, prompt: Tokens) -> int:
        """Forget what was before, read the prompt and return the first new token."""
        ...

    def next(self) -> int:
        """The next token."""
        ...


class BundleDecoder:
    """A bundle's session with room for ``capacity`` tokens, fed as the runner feeds it."""

    def __init__(self, bundle: Bundle, heads: str, capacity: int, threads: int) -> None:
        # Decoders take turns: idle threads of one must not take the cores of the next.
        self._session = open_session(bundle, Backend.ONNXRUNTIME, heads, threads=threads, spin_after=False)
        self._capacity = capacity
        self._query_heads = bundle.manifest.num_query_heads
        self._length = 0
        self._last = 0

    def first(self, prompt: Tokens) -> int:
        """See :class:`Decoder`."""
        self._session.begin(1, self._capacity)
        chunk = chunk_length(self._session, 1, self._query_heads)
        self._length = 0
        for start in range(0, len(prompt), chunk):
            self._step(prompt[start : start + chunk])
        return self._last

    def next(self) -> int:
        """See :class:`Decoder`."""
        self._step(np.array([self._last], np.int64))
        return self._last

    def _step(self, tokens: Tokens) -> None:
        count = len(tokens)
        logits = self._session.step(
            tokens[None, :],
            np.array([count], np.int32),
            np.array([self._length], np.int32),
            np.array([[count - 1]], np.int64),
        )
        self._length += count
        self._last = int(logits[0, 0].argmax())


class GenaiDecoder:
    """onnxruntime-genai with a shared cache buffer, on a folder that its model builder made."""

    def __init__(self, directory: Path, capacity: int) -> None:
        self._genai: Any = importlib.import_module("onnxruntime_genai")
        self._model = self._genai.Model(str(directory))
        self._capacity = capacity
        self._generator: Any = None

    def first(self, prompt: Tokens) -> int:
        """See :class:`Decoder`."""
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=self._capacity,
            min_length=self._capacity,  # an end-of-sequence token must not stop a measurement
            do_sample=False,
            past_present_share_buffer=True,
        )
        self._generator = None  # its caches go before new ones come
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(prompt.astype(np.int32))
        return self.next()

    def next(self) -> int:
        """See :class:`Decoder`."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def genai_is_installed() -> bool:
    """Whether ``onnxruntime_genai`` can be imported."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def build_genai(
    model: Path, directory: Path, dtype: str, threads: int, int8_cache: DecoderHeads | None = None
) -> None:
    """Build onnxruntime-genai's own model from a Hugging Face directory with a tokenizer.

    ``int8_cache``: store keys and values in 8 bits, with a scale for each channel of these heads. The scales
    are all alike: time does not depend on them, and nobody reads the text.

    Raises:
        ChaiError: its builder fails.
    """
    precision = ELEMENT_TYPES[dtype].triton
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(directory)]
    words += ["-p", precision, "-e", "cpu", "-c", str(directory / "cache")]
    if int8_cache is not None:
        directory.mkdir(parents=True)
        scales = directory / "scales.json"
        scales.write_text(json.dumps({"scales": _scales(int8_cache)}))
        words += ["--extra_options", "kv_cache_quant_scheme=int8_per_channel"]
        words += [f"kv_cache_scale_file={scales}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ChaiError(
            f"onnxruntime-genai cannot build {model} ({last_line(done.stderr)}); "
            "leave --model out to go without"
        )
    path = directory / "genai_config.json"
    config = json.loads(path.read_text())
    options = config["model"]["decoder"]["session_options"]
    options |= {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
    path.write_text(json.dumps(config, indent=2))


def _scales(heads: DecoderHeads) -> dict[str, list[list[float]]]:
    """One scale per channel and layer, in the form of the builder's file."""
    widths = {"k_scales": heads.head_dim, "v_scales": heads.value_head_dim}
    return {name: [[0.05] * heads.num_kv_heads * width] * heads.num_layers for name, width in widths.items()}
