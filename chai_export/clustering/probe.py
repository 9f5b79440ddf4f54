"""How many first tokens of a sequence decide its head map (P), where nobody says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chai_export.errors import ChaiError

if TYPE_CHECKING:
    from chai_export.clustering.clusters import Clusters

PAPER_PROBE_TOKENS = 5
"""The paper's choice (arXiv 2403.08058v2, section 3.3), and what a file means that states no number."""

MEASURED_PROBE_TOKENS = 16
"""What `calibrate` takes unless told otherwise; docs/quality.md has the loss for each length."""


def probe_length(given: int | None, clusters: Clusters) -> int:
    """P for a bundle: as given, else as calibrated, else the paper's.

    The numbers of kept heads were chosen for one length of probe, so that is the one to run with.

    Raises:
        ChaiError: the number is below 1.
    """
    if given is not None:
        if given < 1:
            raise ChaiError(f"--probe-tokens {given} is too few; give 1 or more")
        return given
    stated = clusters.probe_tokens
    if stated is None:
        return PAPER_PROBE_TOKENS
    if stated < 1:
        raise ChaiError(
            f"{clusters.origin}: probe_tokens must be at least 1, not {stated}; correct it or give "
            "--probe-tokens"
        )
    return stated
