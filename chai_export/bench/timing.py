"""Timing of several implementations against each other."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from chai_export.progress import track


@dataclass(frozen=True)
class Timing:
    """Times of one implementation in milliseconds: the median and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles as a share of the median."""
        return (self.upper - self.lower) / 2 / self.median


def interleaved(
    implementations: Mapping[str, Callable[[], object]],
    *,
    min_seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warm_up: bool = True,
    progress: str = "",
) -> dict[str, Timing]:
    """Run all in turn, round after round, so that a slow phase of the machine hits all of them.

    Every round has an order of its own, so that no implementation always runs after the same other one and
    finds what that one left behind, in caches or in threads not yet asleep.

    Args:
        implementations: by name; one call is one measurement.
        min_seconds: time to spend on each of them at least, if ``max_rounds`` allows it.
        min_rounds: measurements of each at least.
        max_rounds: measurements of each at most.
        warm_up: call each once before the rounds, which is not counted.
        progress: name of a progress bar over the rounds; none by default.
    """
    names = list(implementations)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names if warm_up else ():
        implementations[name]()
    spent = 0.0
    order = random.Random(0)
    rounds = track(range(max_rounds), progress) if progress else range(max_rounds)
    for round_ in rounds:
        for name in order.sample(names, len(names)):
            begin = time.perf_counter()
            implementations[name]()
            times[name].append(time.perf_counter() - begin)
        spent += max(seconds[-1] for seconds in times.values())
        if round_ + 1 >= min_rounds and spent >= min_seconds:
            break
    return {name: _summary(seconds) for name, seconds in times.items()}


def _summary(seconds: list[float]) -> Timing:
    if len(seconds) == 1:  # of which there are no quartiles
        return Timing(*[1e3 * seconds[0]] * 3)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(1e3 * median, 1e3 * lower, 1e3 * upper)
