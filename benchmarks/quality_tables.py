"""docs/quality.md from the results of quality_tradeoff.py: tables and the sentences around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scoreboard_tables import section as scoreboard_section

from chai_export.op.probe import MEASURED_PROBE_TOKENS, PAPER_PROBE_TOKENS
from chai_export.quality.methods import METHODS

Row = dict[str, Any]


def page(results: dict[str, Any], boards: Sequence[dict[str, Any]] = ()) -> str:
    """The whole page, Markdown; ``boards`` are results of scoreboard.py."""
    methods, probes = results["methods"], results["probes"]
    parts = [
        _head(results),
        *map(scoreboard_section, boards),
        "## Bytes against quality\n\n" + _tradeoff(results),
        "## Methods at equal bytes\n\n" + _methods(methods),
        "## The op against K-Means and the reference code\n\n" + _paired(results["paired"]),
        "## How long a probe\n\n" + _probes(probes),
        "## Budgets by measured divergence\n\n" + _budgets(results),
    ]
    return "\n\n".join(parts) + "\n"


def _head(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"""# Quality

Made by `python benchmarks/quality_tradeoff.py` on {results["date"]}; do not edit. Measured with
{versions}; float32 in torch on one thread of a {results["machine"]["processor"]}.

Model: `examples/pydoc-5m`, whose redundancy was planted (its README says how), so these figures show that
the method works and how methods rank, not what a large model would lose.
Text: {results["windows"]} windows of {results["seq_len"]} tokens of `examples/text/heldout.txt`
({results["tokens"]} predictions), teacher-forced. With all heads the loss is {results["nll_all"]:.4f} nats
a token (perplexity {results["perplexity_all"]:.2f}). Heads per layer were chosen on
`examples/text/calibration.txt`.

*Loss* is the change of nats per token against all heads, ± its standard error over windows; 0.010 is 1 % of
perplexity. *KL* is the mean divergence from the model with all heads, in nats per token. *Probe* is the
number of first tokens that decide the head map and attend exactly. Your own model:
`chai-export compare MODEL --text FILE --keep RULE`, and a bundle: `chai-export eval BUNDLE --text FILE`,
which also shows KL by position in the sequence and where greedy texts first leave those of all heads. From
Python: `chai_export.quality.method_comparison.compare` and `chai_export.evaluate`."""


def _tradeoff(results: dict[str, Any]) -> str:
    found = {(tuple(row["kept_heads"]), row["probe_tokens"]): row for row in results["tradeoff"]}
    lengths = sorted({row["probe_tokens"] for row in results["tradeoff"]})
    lines = []
    for entry in results["allocations"]:
        if entry["measure"] != "kl":
            continue
        rows = [found[tuple(entry["kept_heads"]), length] for length in lengths]
        lines.append(
            [f"{entry['kv_bytes_saved']:.1%}", _heads(entry["kept_heads"])]
            + [cell for row in rows for cell in (f"{row['perplexity_change']:+.2%}", f"{row['kl']:.4f}")]
            + [f"{rows[-1]['top1_agreement']:.1%}"]
        )
    columns = ["KV bytes saved", "KV heads kept"]
    columns += [f"{what}, probe {length}" for length in lengths for what in ("perplexity", "KL")]
    columns += [f"same top token, probe {lengths[-1]}"]
    return (
        "The op's own rule, heads allocated by measured divergence "
        "(`calibrate --keep budget:X --measure kl`):\n\n" + _table(columns, lines)
    )


def _methods(rows: Sequence[Row]) -> str:
    keeps = list(dict.fromkeys(tuple(row["kept_heads"]) for row in rows))
    lengths = sorted({row["probe_tokens"] for row in rows})
    parts = [
        "All methods keep the same number of heads in each layer, so the same bytes. The op's rule is "
        "`chai`; `chai-export compare --keep RULE` prints this table for any model.",
    ]
    for kept in keeps:
        here = {(row["method"], row["probe_tokens"]): row for row in rows if tuple(row["kept_heads"]) == kept}
        saved = next(iter(here.values()))["kv_bytes_saved"]
        lines = []
        for name, method in METHODS.items():
            cells = [_loss_and_kl(here.get((name, length))) for length in lengths]
            if any(cell != ("", "") for cell in cells):
                lines.append([f"`{name}`", method.summary, *(text for cell in cells for text in cell)])
        columns = ["method", "what it is"]
        columns += [f"{what}, probe {length}" for length in lengths for what in ("loss", "KL")]
        parts.append(f"**{saved:.1%} of KV bytes saved** ({_heads(kept)})\n\n{_table(columns, lines)}")
    parts.append("CHAI-static reads no probe: its one row stands under the first probe length.")
    return "\n\n".join(parts)


def _paired(paired: dict[str, Any]) -> str:
    lines = [
        [
            f"{row['kv_bytes_saved']:.1%}",
            f"`{row['method']}`",
            *_loss_and_kl(row),
            "" if row["method"] == "chai" else f"{row['difference']:+.4f} ± {row['difference_error']:.4f}",
        ]
        for row in paired["results"]
    ]
    columns = ["KV bytes saved", "method", "loss", "KL", "`chai` less this"]
    return (
        f"At {MEASURED_PROBE_TOKENS} probe tokens on {paired['windows']} windows, all of the held-out text "
        f"({paired['tokens']} predictions). The last column is the mean over windows of the difference of "
        "their losses, ± its standard error: below zero the op's rule loses less.\n\n"
        + _table(columns, lines)
    )


def _probes(rows: Sequence[Row]) -> str:
    keeps = list(dict.fromkeys(tuple(row["kept_heads"]) for row in rows))
    saved = {tuple(row["kept_heads"]): row["kv_bytes_saved"] for row in rows}
    found = {(tuple(row["kept_heads"]), row["probe_tokens"]): row for row in rows}
    lines = [
        [str(length), *(text for kept in keeps for text in _loss_and_kl(found[kept, length]))]
        for length in sorted({row["probe_tokens"] for row in rows})
    ]
    columns = ["probe tokens"]
    columns += [f"{what}, {saved[kept]:.1%} saved" for kept in keeps for what in ("loss", "KL")]
    return (
        "The op's rule with probes of different length; the probe's tokens are exact, which the figures "
        f"include. `calibrate` takes {MEASURED_PROBE_TOKENS}: loss and divergence are below those of the "
        f"paper's {PAPER_PROBE_TOKENS} "
        f"(`--probe-tokens {PAPER_PROBE_TOKENS}`), and longer ones gain little, while a sequence shorter "
        "than the probe shares nothing. The error curves, the measured divergences and the head maps of a "
        "bundle all use the length that `calibrate` was given.\n\n" + _table(columns, lines)
    )


def _budgets(results: dict[str, Any]) -> str:
    probe = results["allocation_probe_tokens"]
    found = {tuple(row["kept_heads"]): row for row in results["tradeoff"] if row["probe_tokens"] == probe}
    lines = []
    for entry in results["allocations"]:
        row = found[tuple(entry["kept_heads"])]
        lines.append(
            [
                f"{entry['budget']:.1%}",
                {"kl": "measured", "error": "error curves"}[entry["measure"]],
                _heads(entry["kept_heads"]),
                f"{entry['predicted_kl']:.4f}",
                *_loss_and_kl(row)[::-1],
            ]
        )
    columns = ["budget", "allocated by", "KV heads kept", "KL predicted", "KL measured", "loss"]
    return (
        "Error curves say how far the probe's probabilities move; `--measure kl` asks the model how much it "
        "minds, one layer at a time, and minimises the sum (past the elbows, where little is lost, together "
        "with the error curves). The sum assumes that layers do not interact: "
        f"*predicted* is that sum (calibration text), *measured* is what all layers together do (held-out "
        f"text), both with a probe of {probe} tokens.\n\n" + _table(columns, lines)
    )


def _loss_and_kl(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return f"{row['nll_change']:+.4f} ± {row['nll_change_error']:.4f}", f"{row['kl']:.4f}"


def _heads(kept: Sequence[int]) -> str:
    return ", ".join(map(str, kept))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
