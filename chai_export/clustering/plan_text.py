"""A plan in words: what it shrinks the cache by, what each part contributes, and what it costs."""

from __future__ import annotations

from itertools import groupby

from chai_export.clustering.plan import Plan
from chai_export.clustering.plan_parts import part_sentences


def plan_rows(plan: Plan) -> list[tuple[str, str, int, int]]:
    """Rows of a table: layers that are alike, kept KV heads, bits of keys, bits of values."""
    rows = []
    for layer, alike in groupby(range(len(plan.layers)), key=lambda index: plan.layers[index]):
        members = list(alike)
        name = str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
        of = f"{layer.kept_heads} of {plan.num_kv_heads}" if plan.num_kv_heads else str(layer.kept_heads)
        rows.append((name, of, layer.key_bits, layer.value_bits))
    return rows


def plan_sentences(plan: Plan) -> list[str]:
    """The last lines of `calibrate`."""
    lines = []
    if plan.kv_bytes_share is not None:
        share = plan.kv_bytes_share
        lines.append(
            f"cache: {1 / share:.2f} times smaller than all heads in float16 ({share:.1%} of the bytes)"
        )
    if plan.heads is not None:
        lines.append("; ".join(part_sentences(plan, plan.heads)))
    if plan.expected is not None:
        lines.append(
            f"expected: perplexity {plan.expected.perplexity_ratio - 1:+.2%}, "
            f"divergence {plan.expected.kl:.4f} nats"
        )
    if plan.checked is not None:
        check = plan.checked
        lines.append(
            f"checked on {check.tokens} unseen tokens: perplexity {check.perplexity_ratio - 1:+.2%} "
            f"± {check.perplexity_error:.2%}, divergence {check.kl:.4f} nats, same most likely token "
            f"{check.top1_agreement:.1%}"
        )
    return lines
