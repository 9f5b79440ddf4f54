"""What an op looks like from outside: inputs, outputs and attributes with their types and dims.

One description, from which the ONNX schema, test models, function headers and the C++ header are made.
"""

from __future__ import annotations

from dataclasses import dataclass

Default = float | int

VERSION = 2
"""Of both ops. Version 1 had one cache for each row, in T."""


@dataclass(frozen=True)
class Parameter:
    """An input or output: ``type`` names a type variable of the signature, ``dims`` its sizes by symbol.

    A size that an output has beside its inputs is a product of symbols, "H*Dv". ``follows`` is the input that
    an output continues: it has the same type and shape.
    """

    name: str
    type: str
    dims: tuple[str, ...]
    meaning: str
    optional: bool = False
    follows: str | None = None

    @property
    def text(self) -> str:
        """``[B,H,S,D]: meaning``."""
        return f"[{','.join(self.dims)}]: {self.meaning}"


@dataclass(frozen=True)
class Attribute:
    """A node attribute with its default; the type of the default is the attribute's."""

    name: str
    default: Default
    meaning: str


@dataclass(frozen=True)
class Signature:
    """One op.

    ``types`` are the names of the element types (:mod:`chai_export.op.dtypes`) that each type variable has.
    """

    op_type: str
    version: int
    doc: str
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    attributes: tuple[Attribute, ...]
    types: dict[str, tuple[str, ...]]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of all inputs, optional ones included."""
        return tuple(parameter.name for parameter in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of all outputs, optional ones included."""
        return tuple(parameter.name for parameter in self.outputs)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of all attributes, in order."""
        return tuple(attribute.name for attribute in self.attributes)
