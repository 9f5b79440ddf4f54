"""What a step tells of the logits of its rows: all, or the likeliest where these decide the next token.

A session on a GPU that has ``step_top`` leaves logits there: a vocabulary of 128,000 is half a MiB a row and
step, of which greedy choice needs one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 256
"""More candidates than this are not asked for: then the whole row comes."""


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens of a row: ids int64 [K] and logits float32 [K], falling, equals in any order.

    ``every`` gives all logits [V] until the session's next step.
    """

    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]
    every: Callable[[], NDArray[np.float32]]


Scores = NDArray[np.float32] | Likeliest


def step_rows(session: Any, wanted: Sequence[int | None], *arguments: Any) -> list[Scores]:
    """A step of rows that want logits at one position each.

    Args:
        session: whose ``step`` takes the ``arguments``, or its ``step_top`` if it has one.
        wanted: how many of the likeliest tokens decide, by row; None for all logits.
        arguments: as of :meth:`chai_export.runtime.session.Session.step`.

    Returns:
        for each row its logits [V], or one candidate more than any row wants.
    """
    most = max((MOST + 1 if count is None else count for count in wanted), default=0)
    if most > MOST or not hasattr(session, "step_top"):
        return list(session.step(*arguments)[:, 0])
    likeliest: list[Scores] = session.step_top(most + 1, *arguments)
    return likeliest
