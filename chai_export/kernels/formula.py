"""Grid sizes and workspace sizes as short formulas, so that Python and C++ evaluate the same text.

In Python a formula is written with operators, ``cdiv(S, 64)``. Its text is in reverse Polish notation: tokens
separated by spaces, evaluated with a stack of 64-bit integers, ``"S 64 cdiv"``. Tokens are decimal integers,
symbols (names of shapes) and the operators of :data:`OPERATORS`; comparisons give 1 or 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "cdiv": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
    "<": lambda a, b: int(a < b),
    "==": lambda a, b: int(a == b),
}
"""Each takes the two topmost values; the one pushed first is the left operand."""


@dataclass(frozen=True)
class Formula:
    """An expression of symbols and integers; ``str()`` gives its text."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Operand) -> Formula:
        return _joined(self, other, "+")

    def __sub__(self, other: Operand) -> Formula:
        return _joined(self, other, "-")

    def __mul__(self, other: Operand) -> Formula:
        return _joined(self, other, "*")

    def __rmul__(self, other: int) -> Formula:
        return _joined(other, self, "*")

    def __lt__(self, other: Operand) -> Formula:
        return _joined(self, other, "<")

    def equals(self, other: Operand) -> Formula:
        """1 where the values are equal, else 0."""
        return _joined(self, other, "==")


Operand = Formula | int


def symbols(names: str) -> list[Formula]:
    """One formula for each name, separated by spaces."""
    return [Formula(name) for name in names.split()]


def cdiv(numerator: Operand, denominator: Operand) -> Formula:
    """The quotient, rounded up."""
    return _joined(numerator, denominator, "cdiv")


def minimum(one: Operand, other: Operand) -> Formula:
    """The smaller value."""
    return _joined(one, other, "min")


def _joined(left: Operand, right: Operand, operator: str) -> Formula:
    return Formula(f"{left} {right} {operator}")


def evaluate(formula: str, symbols: Mapping[str, int]) -> int:
    """Value of a formula.

    Raises:
        ValueError: an unknown token, or operands that do not match the operators.
    """
    stack: list[int] = []
    for token in formula.split():
        if token in OPERATORS:
            if len(stack) < 2:
                raise ValueError(f"formula {formula!r}: operator {token} lacks an operand")
            right = stack.pop()
            stack.append(OPERATORS[token](stack.pop(), right))
        elif token in symbols:
            stack.append(symbols[token])
        elif token.lstrip("-").isdigit():
            stack.append(int(token))
        else:
            raise ValueError(f"formula {formula!r}: unknown token {token!r}")
    if len(stack) != 1:
        raise ValueError(f"formula {formula!r} leaves {len(stack)} values")
    return stack[0]
