"""Grid sizes and workspace sizes as short formulas, so that Python and C++ evaluate the same text.

A formula is written in reverse Polish notation: tokens separated by spaces, evaluated with a stack of 64-bit
integers. ``"S 64 cdiv"`` is ceil(S / 64). Tokens are decimal integers, symbols (names of shapes) and the
operators of :data:`OPERATORS`; comparisons give 1 or 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
