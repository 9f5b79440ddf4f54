"""Which values the settings of sampling may have, wherever they come from: a call, a manifest, a model."""

from __future__ import annotations

from collections.abc import Callable

from chai_export.arguments import as_integer, as_real

_MOST_SEED = 2**64 - 1
_MOST_TOP_K = 2**63 - 1


def _real(allowed: Callable[[float], bool]) -> Callable[[object], bool]:
    def allows(value: object) -> bool:
        number = as_real(value)
        return number is not None and number < float("inf") and allowed(number)

    return allows


def _whole(most: int) -> Callable[[object], bool]:
    def allows(value: object) -> bool:
        number = as_integer(value)
        return number is not None and 0 <= number <= most

    return allows


_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "temperature": (_real(lambda number: number >= 0), "0 (greedy) or a number above it"),
    "top_k": (_whole(_MOST_TOP_K), "0 (off) or a whole number above it"),
    "top_p": (_real(lambda number: 0 < number <= 1), "a number above 0 and up to 1 (off)"),
    "repetition_penalty": (_real(lambda number: number > 0), "a number above 0; 1 is off"),
    "seed": (_whole(_MOST_SEED), "a whole number from 0 to 2^64 - 1"),
}


def wanted_instead(name: str, value: object) -> str | None:
    """What setting ``name`` takes, in words, if ``value`` is out of its range; None if the value is usable.

    Numbers are finite; truth values and texts are none.
    """
    allows, wanted = _RULES[name]
    return None if allows(value) else wanted
