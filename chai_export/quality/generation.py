"""Generation divergence: where the greedy text with shared scores first leaves the one with all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chai_export.progress import track

if TYPE_CHECKING:
    from chai_export.quality.reference import Logits
    from chai_export.runtime.runner import Runner


@dataclass(frozen=True)
class GreedyDivergence:
    """One prompt.

    Attributes:
        prompt_tokens: its length.
        new_tokens: tokens that CHAI generated.
        first_difference: index of the first of them that all heads would not have chosen; None without one.
    """

    prompt_tokens: int
    new_tokens: int
    first_difference: int | None


def greedy_divergence(
    chai: Runner, every: Logits, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[GreedyDivergence]:
    """Generate greedily with CHAI and find the first token that all heads would not have chosen.

    All heads are fed CHAI's own text in one pass rather than generating theirs: up to the first difference
    the two texts are the same, so it is found at the same place. One sequence's logits exist at a time.

    Args:
        chai: a bundle with ``heads="chai"``.
        every: logits with all heads.
        prompts: token ids.
        new_tokens: tokens to generate at most; fewer where the bundle has no positions left.
    """
    if not prompts:
        return []
    made = chai.generate(
        [list(prompt) for prompt in prompts],
        max_new_tokens=new_tokens,
        repetition_penalty=1.0,
        ignore_eos=True,
    )
    found = []
    for prompt, generation in track(zip(prompts, made, strict=True), "comparing texts", total=len(prompts)):
        chosen = generation.token_ids
        wanted = every([*prompt, *chosen])[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        found.append(GreedyDivergence(len(prompt), len(chosen), _first_difference(chosen, wanted)))
    return found


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
