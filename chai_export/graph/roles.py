"""Which graph input is what, and the sizes that symbolic dims take when a part of the graph is evaluated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.constants import rank


@dataclass(frozen=True)
class Sizes:
    """Batch rows, new tokens and past tokens of one evaluation."""

    batch: int
    tokens: int
    past: int

    @property
    def total(self) -> int:
        """Past and new tokens."""
        return self.past + self.tokens


@dataclass(frozen=True)
class Roles:
    """The inputs of a decoder: token ids, caches, and mask and position ids, which may be absent."""

    input_ids: ir.Value
    attention_mask: ir.Value | None
    position_ids: ir.Value | None
    caches: tuple[ir.Value, ...]

    def symbols(self, sizes: Sizes) -> dict[str, int]:
        """The number that each dim name of an input stands for."""
        known: dict[str, int] = {}
        expected = [
            (self.attention_mask, {0: sizes.batch, 1: sizes.total}),
            *((cache, {0: sizes.batch, 2: sizes.past}) for cache in self.caches),
            (self.position_ids, {0: sizes.batch, 1: sizes.tokens}),
            (self.input_ids, {0: sizes.batch, 1: sizes.tokens}),
        ]
        for value, dims in expected:
            if value is None or value.shape is None:
                continue
            for axis, size in dims.items():
                dim = value.shape[axis] if axis < len(value.shape) else None
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier():
                    known[dim.value] = size
        return known

    def dims(self, value: ir.Value, sizes: Sizes) -> list[int | None] | None:
        """The shape of any value under ``sizes``; unknown dims are None, an unknown rank gives None."""
        if value.shape is None:
            return None
        symbols = self.symbols(sizes)
        result: list[int | None] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                result.append(dim)
            elif value in self.caches and axis in (0, 2):
                result.append(sizes.batch if axis == 0 else sizes.past)
            else:
                result.append(_evaluate(dim, symbols))
        return result


def _evaluate(dim: ir.SymbolicDim, symbols: dict[str, int]) -> int | None:
    if dim.value is None:
        return None
    if dim.value in symbols:
        return symbols[dim.value]
    try:
        if not {str(symbol) for symbol in dim.free_symbols()} <= set(symbols):
            return None
        result = dim.evaluate(symbols)
    except (ValueError, TypeError, AttributeError):
        return None  # not an expression: exporters may write any text as a name
    return result if isinstance(result, int) else None


def find_roles(graph: ir.Graph, caches: Iterable[ir.Value]) -> Roles:
    """Tell the graph's inputs apart by name, and by rank where the name is the exporter's own.

    Raises:
        ChaiError: there are no token ids, or an input is none of the known ones.
    """
    known = tuple(dict.fromkeys(caches))
    rest = [value for value in graph.inputs if value not in known]
    named = {value.name: value for value in rest}
    input_ids = named.pop("input_ids", None)
    if input_ids is None or rank(input_ids) not in (None, 2):
        raise ChaiError(
            "the graph has no input named input_ids of shape [batch, tokens]; "
            "export a decoder-only text model with its token ids as input"
        )
    attention_mask = named.pop("attention_mask", None)
    position_ids = named.pop("position_ids", None)
    # Inputs that nothing uses do no harm.
    unknown = [name for name, value in named.items() if value.uses()]
    if unknown:
        raise ChaiError(
            f"the graph has inputs that the rewrite does not know ({', '.join(map(str, unknown))}); "
            "export with input_ids, attention_mask, position_ids and past key/values only"
        )
    return Roles(input_ids, attention_mask, position_ids, known)
