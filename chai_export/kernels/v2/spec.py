"""What is fixed when a kernel of version 2 is compiled (:class:`Spec`) and what each call brings."""

from __future__ import annotations

from dataclasses import dataclass

from chai_export.errors import ChaiError
from chai_export.kernels import spec as version_1
from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.storage import Storage


@dataclass(frozen=True)
class Spec(version_1.Spec):
    """A layer's constants: heads, how its rows are stored, and which terms its scores have.

    Layers that agree in them share one set of cubins; R, B, S, pages and the window stay run-time values.

    Raises:
        ChaiError: sizes outside the kernels' limits, or storage that the op does not have.
    """

    key_bits: int = 0
    value_bits: int = 0
    group_size: int = DEFAULT_GROUP
    softcap: bool = False
    sinks: bool = False
    slopes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = self.storage_k, self.storage_v
        except ValueError as error:
            raise ChaiError(f"GPU kernels: {error}") from error

    @property
    def storage_k(self) -> Storage:
        """How keys are stored."""
        return Storage(self.key_bits, self.head_dim, self.group_size)

    @property
    def storage_v(self) -> Storage:
        """How values are stored."""
        return Storage(self.value_bits, self.value_head_dim, self.group_size)

    @property
    def stored_as_given(self) -> bool:
        """Whether what is read back is what the call brought."""
        return self.key_bits == 0 and self.value_bits == 0


@dataclass(frozen=True)
class Shape(version_1.Shape):
    """The sizes of one call: B, S, R and C as in version 1, pages in the pool N, positions per page L.

    C is the row capacity, pages per row M times L.
    """

    pages: int
    page_length: int

    @property
    def row_pages(self) -> int:
        """Pages a row may have (M)."""
        return self.capacity // self.page_length

    def symbols(self, spec: version_1.Spec) -> dict[str, int]:
        """The symbols of the launch formulas."""
        return super().symbols(spec) | {"N": self.pages, "L": self.page_length}
