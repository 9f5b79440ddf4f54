"""Token windows: the sequences that calibration and evaluation cut from a text.

Each is the start of a sequence as a model sees it: the special tokens that the tokenizer puts in front
(``leading``), then text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError


def consecutive_windows(
    tokens: NDArray[np.int32] | Sequence[int], leading: Sequence[int], length: int
) -> list[list[int]]:
    """The whole text in sequences of ``length`` tokens; the last is shorter.

    A sequence in which nothing could be predicted is left out.
    """
    ids = [int(token) for token in tokens]
    fresh = length - len(leading)
    cut = [[*leading, *ids[start : start + fresh]] for start in range(0, len(ids), fresh)]
    return [sequence for sequence in cut if len(sequence) >= max(2, len(leading) + 1)]


def spread_windows(
    tokens: NDArray[np.int32], leading: Sequence[int], count: int, length: int
) -> NDArray[np.int32]:
    """Sequences spread evenly over the text: int32 [≤ count, length].

    Raises:
        ChaiError: the text is shorter than one sequence.
    """
    fresh = length - len(leading)
    available = len(tokens) // fresh
    if available == 0:
        raise ChaiError(
            f"the text has {len(tokens)} tokens, a sequence takes {fresh}; give more text or lower --seq-len"
        )
    taken = np.linspace(0, available - 1, min(count, available)).round().astype(int)
    cut = np.empty((len(taken), length), dtype=np.int32)
    cut[:, : len(leading)] = leading
    cut[:, len(leading) :] = tokens[taken[:, None] * fresh + np.arange(fresh)]
    return cut


def start_windows(
    tokens: NDArray[np.int32], leading: Sequence[int], samples: int, seq_len: int, starts: int, length: int
) -> NDArray[np.int32]:
    """Short starts of sequences, several from each of evenly spread samples: int32 [samples, starts, length].

    Args:
        tokens: the text.
        leading: special tokens; what does not fit into ``length`` is left out.
        samples: pieces of the text.
        seq_len: tokens of a piece.
        starts: windows cut from each piece, fewer where they would overlap.
        length: tokens of a window, at most ``seq_len``.

    Raises:
        ChaiError: the text is shorter than one sample.
    """
    pieces = spread_windows(tokens, (), samples, seq_len)
    leading = leading[:length]
    taken = length - len(leading)
    windows = min(starts, max(1, seq_len // max(1, taken)))
    offsets = np.linspace(0, seq_len - max(1, taken), windows).astype(int)
    cut = np.empty((len(pieces), windows, length), dtype=np.int32)
    cut[:, :, : len(leading)] = leading
    cut[:, :, len(leading) :] = pieces[:, offsets[:, None] + np.arange(taken)]
    return cut
