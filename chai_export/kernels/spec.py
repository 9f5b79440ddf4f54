"""What is fixed when a kernel is compiled (:class:`Spec`) and what each call brings (:class:`Shape`)."""

from __future__ import annotations

from dataclasses import dataclass

from chai_export.errors import ChaiError
from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.op.heads import HeadCounts
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.op.storage import Storage

MAX_HEADS = 128
MAX_HEAD_DIM = 256
MAX_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Spec(HeadCounts):
    """A layer's constants: heads, how its rows are stored, and which terms its scores have.

    Layers that agree in them share one set of cubins; R, B, S, pages and the window stay run-time values.

    Raises:
        ChaiError: sizes outside the kernels' limits, or storage that the op does not have.
    """

    dtype: str
    probe_tokens: int = PAPER_PROBE_TOKENS
    key_bits: int = 0
    value_bits: int = 0
    group_size: int = DEFAULT_GROUP
    softcap: bool = False
    sinks: bool = False
    slopes: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in Dtype.words():
            raise ChaiError(f"GPU kernels do not support dtype {self.dtype}; use one of {', '.join(Dtype)}")
        if not 1 <= self.num_query_heads <= MAX_HEADS:
            raise ChaiError(f"GPU kernels support 1 to {MAX_HEADS} query heads, got {self.num_query_heads}")
        if self.num_kv_heads < 1 or self.num_query_heads % self.num_kv_heads:
            raise ChaiError(
                f"{self.num_query_heads} query heads are not a multiple of {self.num_kv_heads} KV heads; "
                "check num_key_value_heads in the model's config"
            )
        for name, dim in (("head_dim", self.head_dim), ("value_head_dim", self.value_head_dim)):
            if not 1 <= dim <= MAX_HEAD_DIM:
                raise ChaiError(f"GPU kernels support {name} up to {MAX_HEAD_DIM}, got {dim}")
        if not 1 <= self.probe_tokens <= MAX_PROBE_TOKENS:
            raise ChaiError(
                f"GPU kernels support 1 to {MAX_PROBE_TOKENS} probe tokens, got {self.probe_tokens}; "
                "lower --probe-tokens"
            )
        try:
            _ = self.storage_k, self.storage_v
        except ValueError as error:
            raise ChaiError(f"GPU kernels: {error}") from error

    @property
    def item_bytes(self) -> int:
        """Bytes of one element of the tensors."""
        return ELEMENT_TYPES[self.dtype].item_size

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
class Shape:
    """The sizes of one call.

    Batch rows B, new tokens S, kept KV heads R, capacity of a row C (pages per row times L), pages in the
    pool N, positions per page L.
    """

    batch: int
    tokens: int
    kept: int
    capacity: int
    pages: int
    page_length: int

    @property
    def row_pages(self) -> int:
        """Pages a row may have (M)."""
        return self.capacity // self.page_length

    def symbols(self, spec: Spec) -> dict[str, int]:
        """The symbols of the launch formulas."""
        return {
            "B": self.batch,
            "S": self.tokens,
            "R": self.kept,
            "C": self.capacity,
            "N": self.pages,
            "L": self.page_length,
            "H": spec.num_query_heads,
            "G": spec.num_kv_heads,
            "D": spec.head_dim,
            "Dv": spec.value_head_dim,
            "P": spec.probe_tokens,
        }
