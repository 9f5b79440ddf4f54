"""The attributes of one node of the op, typed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from chai_export.op.probe import PAPER_PROBE_TOKENS

DEFAULT_GROUP = 32


@dataclass(frozen=True)
class Attributes:
    """What a node of either op says beside its tensors; the field names are the attributes' names.

    ``scale`` 0 means 1/sqrt(D). ``key_bits`` and ``value_bits`` are 0 (storage in T), 16 (float16), 8 or 4;
    ``group`` is the number of elements along the head dim that share a scale. ``window`` 0 and ``softcap`` 0
    mean none.
    """

    scale: float = 0.0
    probe_tokens: int = PAPER_PROBE_TOKENS
    online: bool = True
    key_bits: int = 0
    value_bits: int = 0
    group: int = DEFAULT_GROUP
    window: int = 0
    softcap: float = 0.0

    def as_onnx(self) -> dict[str, float | int]:
        """All of them by name, as node attributes."""
        return {
            name: int(value) if isinstance(value, bool) else value for name, value in asdict(self).items()
        }

    def factor(self, head_dim: int) -> float:
        """The factor on query·key."""
        return self.scale if self.scale != 0.0 else float(head_dim) ** -0.5

    def first_visible(self, position: int) -> int:
        """The first position that a token at ``position`` sees."""
        return max(0, position - self.window + 1) if self.window else 0

    def check(self) -> None:
        """Raise ValueError where a value means nothing."""
        if self.probe_tokens < 1:
            raise ValueError(f"probe_tokens must be at least 1, got {self.probe_tokens}")
        if self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")
        if not 0.0 <= self.softcap < float("inf"):
            raise ValueError(f"softcap must be finite and not negative, got {self.softcap}")
