"""The clustering methods that can be compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chai_export.errors import UsageError
from chai_export.quality import methods_medoids as medoids
from chai_export.quality import methods_published as published
from chai_export.quality.methods_medoids import HeadMap, Measure, Probabilities

Rule = Callable[[Probabilities, int, int, int], HeadMap]
"""(probe probabilities float32 [H, t, t], G, R, seed) -> head map int32 [H]."""


@dataclass(frozen=True)
class Method:
    """One way to decide which heads share scores.

    Attributes:
        name: what users type.
        summary: one line for tables.
        rule: the function that decides; None when maps are fixed before (CHAI-static).
        causal: whether the probe's probabilities are masked causally, as the model's are.
        exact_probe: whether the probe tokens attend exactly, as in the paper.
    """

    name: str
    summary: str
    rule: Rule | None
    causal: bool = True
    exact_probe: bool = True


def _medoids(choose: Callable[..., HeadMap], measure: Measure) -> Rule:
    def rule(probabilities: Probabilities, num_kv_heads: int, kept: int, seed: int) -> HeadMap:
        del seed
        return choose(measure(probabilities), num_kv_heads, kept)

    return rule


def op_rule(probabilities: Probabilities, num_kv_heads: int, kept: int, seed: int) -> HeadMap:
    """What the op does (docs/op.md), through the very function that defines it."""
    from chai_export.models.oracle import op_head_map

    del seed
    return op_head_map(probabilities, num_kv_heads, kept)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("chai", "the op: absolute distance, every choice made twice", op_rule),
        Method(
            "greedy",
            "greedy medoids, squared distance",
            _medoids(medoids.greedy_map, medoids.squared_distance),
        ),
        Method(
            "greedy-absolute",
            "greedy medoids, absolute distance",
            _medoids(medoids.greedy_map, medoids.absolute_distance),
        ),
        Method(
            "greedy-cosine",
            "greedy medoids, cosine distance",
            _medoids(medoids.greedy_map, medoids.cosine_distance),
        ),
        Method(
            "refined",
            "every choice made twice, squared distance",
            _medoids(medoids.refined_map, medoids.squared_distance),
        ),
        Method(
            "voronoi",
            "greedy, then Voronoi iteration, squared distance",
            _medoids(medoids.voronoi_map, medoids.squared_distance),
        ),
        Method("k-means", "the paper: K-Means, head nearest to the centre", published.k_means_map),
        Method(
            "agglomerative",
            "reference code's rule with the causal mask",
            published.agglomerative_map,
        ),
        Method(
            "agglomerative-unmasked",
            "reference code's rule as published: no causal mask, probe tokens not exact",
            published.agglomerative_map,
            causal=False,
            exact_probe=False,
        ),
        Method("static", "CHAI-static: one map per layer from calibration text", None, exact_probe=False),
        Method("random", "random representatives and members", published.random_map),
    )
}
"""Every method by name, in the order of tables."""


def methods_named(names: Sequence[str]) -> list[Method]:
    """Methods by name.

    Raises:
        UsageError: there is no method of that name.
    """
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods: there is no method {name!r}; choose from {', '.join(METHODS)}")
    return [METHODS[name] for name in names]
