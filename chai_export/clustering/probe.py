"""The length of the probe that a bundle is made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chai_export.arguments import whole
from chai_export.errors import ChaiError
from chai_export.op.probe import PAPER_PROBE_TOKENS

if TYPE_CHECKING:
    from chai_export.clustering.plan import Chosen


def probe_length(given: int | None, clusters: Chosen | None) -> int:
    """P for a bundle: as given, else as calibrated, else the paper's.

    The numbers of kept heads were chosen for one length of probe, so that is the one to run with.

    Raises:
        UsageError: ``given`` is no whole number from 1.
        ChaiError: the number in the clusters is below 1.
    """
    if given is not None:
        return whole(given, "--probe-tokens")
    stated = None if clusters is None else clusters.probe_tokens
    if clusters is None or stated is None:
        return PAPER_PROBE_TOKENS
    if stated < 1:
        raise ChaiError(
            f"{clusters.origin}: probe_tokens must be at least 1, not {stated}; correct it or give "
            "--probe-tokens"
        )
    return stated
