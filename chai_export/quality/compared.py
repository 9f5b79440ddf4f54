"""What comparisons of methods are made on: a model, text to choose by, and text to measure on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError
from chai_export.models.geometry import Geometry
from chai_export.models.kv_sources import describe_model
from chai_export.models.loading import load_model
from chai_export.models.text import Text, leading_special_tokens, read_tokens, require_in_vocabulary
from chai_export.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Compared:
    """A loaded model with texts as tokens.

    Attributes:
        model: in float32.
        geometry: of the model, whose layers have caches of their own.
        tokenizer: of the model, if it has one.
        known: int32, what methods choose by.
        measured: int32, what they are measured on.
        leading: special tokens that sequences start with.
    """

    model: PreTrainedModel
    geometry: Geometry
    tokenizer: PreTrainedTokenizerBase | None
    known: NDArray[np.int32]
    measured: NDArray[np.int32]
    leading: list[int]

    @property
    def name(self) -> str:
        """Of the model."""
        return Path(str(self.model.config.name_or_path)).name or self.geometry.model_type

    @property
    def skip(self) -> int:
        """Positions in front whose predictions do not count."""
        return max(0, len(self.leading) - 1)


def compared(
    model: str | Path | PreTrainedModel,
    text: Text | Iterable[Text],
    calibration: Text | Iterable[Text] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    trust_remote_code: bool,
) -> Compared:
    """Load a model and cut the texts; without ``calibration`` methods choose by the first half of ``text``.

    Raises:
        ChaiError: model or text cannot be used, or layers of the model read another layer's cache.
    """
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    geometry = describe_model(loaded)
    if geometry.kv_source_layers is not None:
        raise ChaiError(
            "layers of this model read another layer's KV cache, and the methods compared here choose "
            "for each layer by itself; compare on a model whose layers have their own"
        )
    if tokenizer is None:
        source = str(loaded.config.name_or_path) if not isinstance(model, (str, Path)) else model
        tokenizer = load_tokenizer(source) if source else None
    tokens = read_tokens(text, tokenizer)
    require_in_vocabulary(tokens, loaded)
    if calibration is None:
        known, measured = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    else:
        known, measured = read_tokens(calibration, tokenizer), tokens
        require_in_vocabulary(known, loaded)
    return Compared(loaded, geometry, tokenizer, known, measured, list(leading_special_tokens(tokenizer)))
