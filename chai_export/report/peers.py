"""Other ways to make the cache smaller, as `compare --json` measured them: points, legend and verdicts."""

from __future__ import annotations

from string import ascii_letters
from typing import Any

OURS = "plan"
"""The method of `compare` that is a plan."""


def peers(comparison: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of a scoreboard; None where there is none.

    Args:
        comparison: output of `compare --json`; that of clustering rules alone (``--keep``) has no methods.

    Returns:
        ``methods``: name and letter of each but plans, and whether the op runs it (at any setting); ``rows``:
        those of the comparison by bytes, with ``letter`` ("" for plans); ``verdicts``: for each plan the best
        other method in no more bytes, ``on_op`` and ``any``, each ``{"row", "better"}`` or None, ``better``:
        whether it diverges less than the plan; ``kept``: plans that nothing the op runs is better than, by
        ``any`` that nothing is better than; besides ``model``, ``tokens``, ``windows``, ``seq_len``,
        ``missing``.
    """
    if comparison is None or "rows" not in comparison:
        return None
    rows = sorted(comparison["rows"], key=lambda row: row["bytes_share"])
    names = [name for name in dict.fromkeys(row["method"] for row in comparison["rows"]) if name != OURS]
    letters = {name: ascii_letters[index % len(ascii_letters)] for index, name in enumerate(names)}
    by_name = {(row["method"], row["setting"]): row for row in rows}
    verdicts = [
        {
            "plan": by_name[_name(entry["plan"])],
            **{which: _beside(by_name, entry["plan"], entry[which]) for which in ("on_op", "any")},
        }
        for entry in comparison["at_equal_bytes"]
    ]
    return {
        **{name: comparison[name] for name in ("model", "tokens", "windows", "seq_len", "missing")},
        "methods": [
            {
                "name": name,
                "letter": letters[name],
                "on_op": any(row["on_op"] for row in rows if row["method"] == name),
            }
            for name in names
        ],
        "rows": [{**row, "letter": letters.get(row["method"], "")} for row in rows],
        "verdicts": verdicts,
        "kept": {
            which: sum(not (each[which] and each[which]["better"]) for each in verdicts)
            for which in ("on_op", "any")
        },
    }


def _beside(
    by_name: dict[tuple[str, str], dict[str, Any]], plan: dict[str, str], other: dict[str, str] | None
) -> dict[str, Any] | None:
    if other is None:
        return None
    row = by_name[_name(other)]
    return {"row": row, "better": row["kl"] < by_name[_name(plan)]["kl"]}


def _name(entry: dict[str, str]) -> tuple[str, str]:
    return entry["method"], entry["setting"]
