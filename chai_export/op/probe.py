"""How many first tokens of a sequence decide its head map (P), where nobody says."""

from __future__ import annotations

PAPER_PROBE_TOKENS = 5
"""The paper's choice (arXiv 2403.08058v2, section 3.3), the default of the op's attribute, and what a file
means that states no number."""

MEASURED_PROBE_TOKENS = 16
"""What `calibrate` takes unless told otherwise; docs/quality.md has the loss for each length."""
