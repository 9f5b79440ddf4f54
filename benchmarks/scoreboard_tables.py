"""A section of docs/quality.md from one result of scoreboard.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_NAMES = {"demo": "the demo model", "smollm2": "SmolLM2-135M-Instruct"}
_WHAT = {
    "plan": "a plan of `calibrate`",
    "bits": "the op, bits of keys/values, all heads",
    "chai": "CHAI, the op's rule",
    "chai-k-means": "CHAI, K-Means",
    "chai-reference": "CHAI, its reference code's rule",
    "chai-static": "CHAI-static",
    "chai-qkv": "CHAI-QKV",
    "deja-vu": "DejaVu-style",
    "spatten": "SpAtten-style",
    "kivi": "KIVI",
    "kvquant": "KVQuant-style",
    "think": "ThinK",
    "slim": "Slim attention",
    "duo": "DuoAttention-style",
    "h2o": "H2O",
    "squeeze": "SqueezeAttention-style",
}


def section(board: dict[str, Any]) -> str:
    """Heading, table, what the table says, and texts."""
    rows = sorted(board["rows"], key=lambda row: row["bytes_share"])
    lines = [
        (
            f"{row['bytes_share']:.1%}",
            _bold(_WHAT[row["method"]], row["method"] == "plan"),
            row["setting"],
            "yes" if row["on_op"] else "",
            f"{row['perplexity_change']:+.2%} ± {row['perplexity_error']:.2%}",
            f"{row['kl']:.4f}",
            f"{row['kl_by_quarter'][0]:.4f}, {row['kl_by_quarter'][-1]:.4f}",
            f"{row['top1_agreement']:.1%}",
        )
        for row in rows
    ]
    columns = ("of float16", "method", "setting", "the op runs it", "perplexity", "KL")
    columns += ("KL of the first and last quarter", "same top token")
    machine = board["machine"]
    parts = [
        f"## Ways to make the cache smaller: {_NAMES[board['model']]}, {board['seq_len']} tokens",
        f"Made by `python benchmarks/scoreboard.py {board['model']} --seq-len {board['seq_len']}` on "
        f"{machine['date']} (torch {board['versions']['torch']}, {machine['processor']}): "
        f"{board['windows']} windows of `examples/text/heldout.txt`, {board['tokens']} predictions; plans, "
        "heads and ranges from `examples/text/calibration.txt`. *Of float16* is what a row takes at the end "
        "of a sequence with all that it takes to read it back; each method's source is in its docstring in "
        "`chai_export/quality/scoreboard/`.",
        _table(columns, lines),
        _verdict(board),
    ]
    if board["missing"]:
        parts.append(
            " ".join(
                f"Not there, or not at every size: {name} ({why})." for name, why in board["missing"].items()
            )
        )
    if board.get("greedy"):
        parts.append("### Greedy texts\n\n" + "\n\n".join(_text(each) for each in board["greedy"]))
    return "\n\n".join(parts)


def _verdict(board: dict[str, Any]) -> str:
    """Plans beside the best of the others that take no more bytes, said of each alike."""
    found = {(row["method"], row["setting"]): row for row in board["rows"]}

    def cell(which: dict[str, str] | None, plan: dict[str, Any]) -> str:
        if which is None:
            return "none takes so little"
        row = found[which["method"], which["setting"]]
        verdict = "" if plan["kl"] <= row["kl"] else ", **better than the plan**"
        return f"{_WHAT[row['method']]} ({row['setting']}): {row['kl']:.4f}{verdict}"

    lines = []
    for each in board["at_equal_bytes"]:
        plan = found[each["plan"]["method"], each["plan"]["setting"]]
        lines.append(
            (
                f"{plan['bytes_share']:.1%}",
                f"{plan['kl']:.4f}",
                cell(each["on_op"], plan),
                cell(each["any"], plan),
            )
        )
    columns = ("plan's bytes", "plan's KL", "best other that the op runs", "best other of all")
    return "At no more bytes than each plan:\n\n" + _table(columns, lines)


def _text(each: dict[str, Any]) -> str:
    lines = [(name, f"`{text.strip()!r}`".replace("|", "\\|")) for name, text in each["texts"].items()]
    return f"After “{each['prompt']}”:\n\n" + _table(("cache", "text"), lines)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
