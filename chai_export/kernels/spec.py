"""What is fixed when a kernel is compiled (:class:`Spec`) and what each call brings (:class:`Shape`)."""

from __future__ import annotations

from dataclasses import dataclass

from chai_export.errors import ChaiError
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.op.heads import HeadCounts
from chai_export.op.probe import PAPER_PROBE_TOKENS

MAX_HEADS = 128
MAX_HEAD_DIM = 256
MAX_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Spec(HeadCounts):
    """A model's constants. R, C, B and S stay run-time values, so one set of cubins serves all layers."""

    dtype: str
    probe_tokens: int = PAPER_PROBE_TOKENS

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

    @property
    def item_bytes(self) -> int:
        """Bytes of one element of the tensors."""
        return ELEMENT_TYPES[self.dtype].item_size


@dataclass(frozen=True)
class Shape:
    """The sizes of one call: batch rows B, new tokens S, kept KV heads R, cache capacity C."""

    batch: int
    tokens: int
    kept: int
    capacity: int

    def symbols(self, spec: Spec) -> dict[str, int]:
        """The symbols of the launch formulas."""
        return {
            "B": self.batch,
            "S": self.tokens,
            "R": self.kept,
            "C": self.capacity,
            "H": spec.num_query_heads,
            "G": spec.num_kv_heads,
            "D": spec.head_dim,
            "Dv": spec.value_head_dim,
            "P": spec.probe_tokens,
        }
